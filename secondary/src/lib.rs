//! The secondary's side: holds the image of a guest. Today it has the image; receiving, staging and the store
//! come with replication.

pub mod image;
