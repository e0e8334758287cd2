//! Wires one node together: configuration in, running tasks out.
