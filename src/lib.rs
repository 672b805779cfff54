//! laminafs: a union (overlay) filesystem that needs no root.
//!
//! Modules from bottom to top; imports point down only: [`sys`], [`layer`], [`union`], [`archive`],
//! [`fuse`], [`mount`], [`store`], [`image`], [`cli`]. [`error`], [`idmap`], [`marks`], [`options`]
//! and [`overrides`] are leaves that all may use.

pub mod archive;
pub mod cli;
pub mod error;
pub mod fuse;
pub mod idmap;
pub mod image;
pub mod layer;
pub mod marks;
pub mod mount;
pub mod options;
pub mod overrides;
pub mod store;
pub mod sys;
pub mod union;
