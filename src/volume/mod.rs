//! One file per volume kind, and the manager that mounts them for a Pod.
