//! API objects that Pods refer to (ConfigMaps, Secrets, tokens), and the fields of a Pod that env and volumes expose.
