//! The command line: arguments to calls, results to exit codes and one line on stderr.
//!
//! Under its own name the command has subcommands; without one, and under any other name, it is
//! a mount program ([`program`]). Exit codes: 0 done, 1 failed, 2 called wrongly.

mod apply;
pub mod diff;
pub mod image;
pub mod layer;
mod migrate;
pub mod mount;
pub mod program;
pub mod setup;
pub mod store;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::error::Error;
use crate::sys::process::Inherited;

const NAME: &str = "lamina";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// First words that make a call one of the subcommand form.
const COMMANDS: [&str; 9] =
    ["mount", "unmount", "umount", "layer", "store", "diff", "image", "setup", "help"];

const PROGRAM_HELP: &str = "\
usage: lamina [-f] [-d] -o OPTS MERGED

  -o OPTS    mount options, separated by commas; may be given more than once
  -f         stay in the foreground
  -d         log each request to stderr; implies -f
  -s         one worker thread
  -h --help, -V --version

examples:
  lamina -o lowerdir=/top:/base,upperdir=/up,workdir=/work /merged
  lamina -o lowerdir=/top:/base /merged
";

const OPTION_HELP: &str = "\
mount options:
  lowerdir=DIR[:DIR...]  read-only layers, topmost first; \\: is a colon in a path, \\, a comma
  upperdir=DIR           layer that takes the changes; without it the mount is read-only
  workdir=DIR            scratch directory on the filesystem of upperdir
  ro, dev, nosuid, noexec, private, shared, slave, allow_other
  volatile               skip syncs; contents may be lost in a crash of the machine
  userxattr              keep marks in user.overlay.* xattrs
  redirect_dir=on|off|follow|nofollow
                         rename directories with lower parts by redirects; follow those there are
  metacopy=on|off, verity=off|on|require
                         changes of attributes copy no data; digests of data
  datadir+=DIR           layer that only lends data to files without their own
  dir_rename_entries=N, dir_rename_size=BYTES
                         how much is copied to rename a directory with lower parts
  noacl                  do without POSIX ACLs
  writeback              let the kernel collect small writes; errors come late
  io=auto|noopen|open    whether opening a file is a request; auto: only where the server needs it
  io=passthrough         open, and the kernel serves files of the upper by itself; root only
  threads=N, transport=dev|uring|fuser, fsname=NAME, log_level=LEVEL, log_file=FILE
";

const EXAMPLES: &str = "\
examples:
  lamina mount --lower /top --lower /base --upper /up --work /work /merged
  lamina mount -o lowerdir=/top:/base /merged          read-only
  lamina -o lowerdir=/base,upperdir=/up,workdir=/work /merged
                                                       as a mount program
  lamina unmount /merged

exit codes: 0 done, 1 failed, 2 called wrongly";

/// A union (overlay) filesystem that needs no root.
#[derive(Parser, Debug)]
#[command(name = NAME, version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Mount a stack of directories as one tree
    #[command(after_help = OPTION_HELP)]
    Mount(mount::MountArgs),
    /// Unmount, and wait until the server has ended
    #[command(alias = "umount")]
    Unmount {
        /// Detach it now, even if it is in use; do not wait
        #[arg(short = 'l', long)]
        lazy: bool,
        /// The directory it is mounted on
        merged: PathBuf,
    },
    /// List or write how directories differ
    #[command(after_help = diff::EXAMPLES)]
    Diff(diff::DiffArgs),
    /// Take images into a store and out of it
    Image(image::ImageCommandArgs),
    /// Keep one layer of a store: create, remove, ...; layers from archives and back
    Layer(layer::LayerCommandArgs),
    /// Be found as fuse-overlayfs by programs that look for it
    Setup(setup::SetupArgs),
    /// Keep a store of layers: init, list, ...
    Store(store::StoreCommandArgs),
}

/// Why a call failed: the sentence to print, and the exit code.
#[derive(Debug)]
pub struct Failure {
    sentence: String,
    code: u8,
}

impl Failure {
    fn usage(error: Error) -> Self {
        Self { sentence: error.to_string(), code: 2 }
    }

    fn run(error: Error) -> Self {
        Self::sentence(error.to_string())
    }

    fn sentence(sentence: String) -> Self {
        Self { sentence, code: 1 }
    }

    fn with_code(sentence: String, code: u8) -> Self {
        Self { sentence, code }
    }

    /// An answer of "no" that the exit code says.
    fn silent() -> Self {
        Self::sentence(String::new())
    }
}

/// Runs one command line, the program's name first, and returns the exit code.
///
/// `inherited` are the descriptors that were open before `main` began; a daemon closes them.
pub fn run(arguments: impl IntoIterator<Item = OsString>, inherited: Inherited) -> ExitCode {
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    if arguments.is_empty() {
        arguments.push(NAME.into());
    }
    match dispatch(&arguments, inherited) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let words: Vec<&str> = failure.sentence.split(['\n', '\r']).collect();
            if !failure.sentence.is_empty() {
                // Nowhere is left to complain when stderr is gone.
                drop(writeln!(std::io::stderr(), "{NAME}: {}", words.join(" ")));
            }
            ExitCode::from(failure.code)
        }
    }
}

fn dispatch(arguments: &[OsString], inherited: Inherited) -> Result<(), Failure> {
    let (name, rest) = arguments
        .split_first()
        .map_or((OsStr::new(NAME), arguments), |(first, rest)| (first.as_os_str(), rest));
    let own_name = Path::new(name).file_name() == Some(OsStr::new(NAME));
    if own_name && is_command_form(rest) {
        return run_command(arguments, inherited);
    }
    match program::parse(rest.iter().cloned()).map_err(|error| {
        Failure::usage(error).with_hint(if own_name { "lamina --help" } else { "--help" })
    })? {
        program::Request::Help => print(&format!("{PROGRAM_HELP}\n{OPTION_HELP}")),
        program::Request::Version if own_name => print(&format!("{NAME} {VERSION}\n")),
        program::Request::Version => {
            print(&format!("{NAME} {VERSION} (mount program, fuse-overlayfs command line)\n"))
        }
        program::Request::Mount(arguments) => mount::run_program(arguments, inherited),
    }
}

impl Failure {
    fn with_hint(mut self, command: &str) -> Self {
        self.sentence.push_str("; see ");
        self.sentence.push_str(command);
        self
    }
}

/// Returns whether arguments under the command's own name are a subcommand's.
fn is_command_form(rest: &[OsString]) -> bool {
    match rest.first() {
        None => true,
        Some(first) => {
            COMMANDS.iter().any(|command| first == command)
                || (rest.len() == 1 && (first == "--help" || first == "-h"))
        }
    }
}

fn run_command(arguments: &[OsString], inherited: Inherited) -> Result<(), Failure> {
    match Cli::try_parse_from(arguments) {
        Ok(Cli { command: Command::Mount(args) }) => mount::run_mount(args, inherited),
        Ok(Cli { command: Command::Unmount { lazy, merged } }) => {
            crate::mount::unmount::unmount(&merged, lazy).map_err(Failure::run)
        }
        Ok(Cli { command: Command::Diff(args) }) => diff::run_diff(args),
        Ok(Cli { command: Command::Image(args) }) => image::run(args),
        Ok(Cli { command: Command::Layer(args) }) => layer::run(args),
        Ok(Cli { command: Command::Setup(args) }) => setup::run(&args),
        Ok(Cli { command: Command::Store(args) }) => store::run(args),
        Err(error)
            if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) =>
        {
            print(&error.render().to_string())
        }
        Err(error) => Err(Failure { sentence: usage_sentence(&error), code: 2 }),
    }
}

/// Returns the first paragraph of clap's message as one line.
fn usage_sentence(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "no command given; see lamina --help".to_owned();
    }
    let text = error.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = first.split_whitespace().collect();
    let sentence = words.join(" ");
    let sentence = sentence.strip_prefix("error: ").unwrap_or(&sentence);
    format!("{sentence}; see lamina --help")
}

fn print(text: &str) -> Result<(), Failure> {
    print_bytes(text.as_bytes())
}

fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|error| Failure::sentence(format!("stdout: write: {error}; check where it goes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn the_argument_tree_is_sound() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn forms_are_told_apart_by_the_first_word() {
        for (line, is_command) in [
            ("", true),
            ("mount -o lowerdir=/a /m", true),
            ("umount /m", true),
            ("--help", true),
            ("-o lowerdir=/a mount", false),
            ("-f -o x /m", false),
            ("--version", false),
            ("overlay /m -o lowerdir=/a", false),
        ] {
            assert_eq!(is_command_form(&words(line)), is_command, "{line}");
        }
    }

    #[test]
    fn usage_errors_are_one_line_and_code_2() {
        for line in [
            "lamina",
            "lamina mount",
            "lamina mount --frob /m",
            "lamina unmount",
            "lamina -x /m",
            "lamina mount -o lowerdir=/a --lower /b /m",
            "lamina mount --threads 0 --lower /a /m",
            "fuse-overlayfs mount",
            "lamina -o frobnicate /m",
            "lamina -o lowerdir=/a,upperdir=/u /m",
            "lamina mount --lower /a --log-level loud /m",
        ] {
            let failure = dispatch(&words(line), Inherited::default()).unwrap_err();
            assert_eq!(failure.code, 2, "{line}: {}", failure.sentence);
            assert_eq!(failure.sentence.lines().count(), 1, "{line}: {}", failure.sentence);
        }
    }
}
