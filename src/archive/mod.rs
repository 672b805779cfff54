//! Layers as archives: applying one to a directory, and making one of what a layer changes.
//!
//! Works on open directories; knows no store, no layer ids and no mounts.

pub mod apply;
pub mod buildkit;
pub mod bundle;
pub mod compress;
pub mod digest;
pub mod flat;
pub mod header;
mod hide;
pub mod ids;
pub mod input;
pub mod manifest;
pub mod metadata;
pub mod naive;
pub mod path;
pub mod pax;
pub mod read;
pub mod same;
pub mod sparse;
pub mod stage;
pub mod tar_split;
mod target;
pub mod transfer;
pub mod view;
pub mod walk;
pub mod write;

pub use apply::{Applied, ApplyOptions, Whiteouts, apply};
pub use digest::Digest;
pub use ids::Ids;
pub use read::Limits;
