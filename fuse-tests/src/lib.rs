//! Harness of the suites that mount laminafs for real: layers from text, mounts that clean up after themselves,
//! canonical snapshots of trees, and generated operation sequences run side by side on two mounts.

pub mod case;
pub mod cases;
pub mod env;
pub mod fixture;
pub mod images;
pub mod kill;
pub mod ops;
pub mod run;
pub mod same;
pub mod store;
pub mod survey;
pub mod tarball;
pub mod targets;
pub mod trace;
pub mod tree;
pub mod unmounted;
pub mod weak;
