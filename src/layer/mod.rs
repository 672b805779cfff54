//! One directory tree in a stack: its directories, reached as (parent, one name), and their
//! handles.
//!
//! Knows nothing of merging. A directory of a layer is a [`Dir`]: its place in the layer's tree
//! plus a handle that is opened when needed and may be closed at any time.

pub mod cache;
mod dir;
pub mod leftover;
mod seen;

pub use dir::{Dir, Layer, Place};
pub use seen::{form_of, link_of_file, overridden, seen};

/// Position of a layer in the stack: 0 is the upper, 1 the topmost lower.
pub type Index = u16;

/// The writable layer, if there is one.
pub const UPPER: Index = 0;
