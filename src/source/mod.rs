//! Where Pods come from: the API server and static manifests.
