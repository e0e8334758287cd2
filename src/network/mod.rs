//! Pod namespaces, the built-in bridge network, host ports and DNS files.
