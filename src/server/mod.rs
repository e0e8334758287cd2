//! The HTTPS endpoints of the node: authentication, authorization, logs, exec, statistics.
