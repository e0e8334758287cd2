//! Images: registry client, store, unpacking, garbage collection, credentials.
