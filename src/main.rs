//! The `lamina` command.

use std::process::ExitCode;

use laminafs::sys::process::Inherited;

fn main() -> ExitCode {
    // Before anything else opens a descriptor.
    let inherited = Inherited::note();
    laminafs::cli::run(std::env::args_os(), inherited)
}
