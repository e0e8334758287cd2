//! The Node object: registration, status, lease, certificates, events.
