//! `lamina mount`, `lamina unmount` and the mount program: arguments to a mount.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing::debug;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::Failure;
use super::program::Arguments;
use crate::error::{Errno, Error};
use crate::mount::{MountSpec, server};
use crate::options::{MountOptions, parse_level, parse_threads, show_path};
use crate::sys::process::Inherited;

/// Environment variable that sets the log level where no option does.
const LOG_VARIABLE: &str = "LAMINA_LOG";

/// Arguments of `lamina mount`.
#[derive(clap::Args, Debug)]
pub struct MountArgs {
    /// Stay in the foreground; log to stderr
    #[arg(short = 'f', long)]
    foreground: bool,
    /// Log each request; implies -f
    #[arg(short = 'd', long)]
    debug: bool,
    /// Mount options: lowerdir=A:B,upperdir=U,workdir=W,ro,volatile,...
    #[arg(short = 'o', value_name = "OPTS", allow_hyphen_values = true)]
    options: Vec<OsString>,
    /// A lower directory, topmost first; taken as it is, without escapes
    #[arg(long, value_name = "DIR")]
    lower: Vec<PathBuf>,
    /// The upper directory; without one the mount is read-only
    #[arg(long, value_name = "DIR")]
    upper: Option<PathBuf>,
    /// The work directory, on the filesystem of the upper
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// off, error, warn, info, debug or trace [default: warn, or $LAMINA_LOG]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Append the log to this file
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Worker threads [default: two a CPU, 4 to 8]
    #[arg(long, value_name = "N")]
    threads: Option<String>,
    /// The directory to mount on
    merged: PathBuf,
}

/// Runs `lamina mount`.
///
/// # Errors
/// The sentence to print.
pub fn run_mount(args: MountArgs, inherited: Inherited) -> Result<(), Failure> {
    mount(&args.options, args.foreground, &args.merged, inherited, |options| {
        for (flag, name, twice) in [
            ("--lower", "lowerdir", !args.lower.is_empty() && !options.lowers.is_empty()),
            ("--upper", "upperdir", args.upper.is_some() && options.upper.is_some()),
            ("--work", "workdir", args.work.is_some() && options.work.is_some()),
        ] {
            if twice {
                return Err(Error::invalid(
                    flag,
                    format!("given beside -o {name}=; use one of them"),
                ));
            }
        }
        options.lowers.extend(args.lower);
        options.upper = options.upper.take().or(args.upper);
        options.work = options.work.take().or(args.work);
        options.debug |= args.debug;
        if let Some(level) = &args.log_level {
            options.log_level = Some(parse_level(level)?);
        }
        options.log_file = args.log_file.or(options.log_file.take());
        if let Some(threads) = &args.threads {
            options.threads = Some(parse_threads(threads)?);
        }
        Ok(())
    })
}

/// Runs the mount-program form.
///
/// # Errors
/// The sentence to print.
pub fn run_program(args: Arguments, inherited: Inherited) -> Result<(), Failure> {
    let target = PathBuf::from(args.target);
    mount(&args.lists, args.foreground, &target, inherited, |options| {
        options.debug |= args.debug;
        if args.single_thread {
            options.threads.get_or_insert(1);
        }
        options.fsname = options.fsname.take().or(args.source);
        Ok(())
    })
}

fn mount<S: AsRef<OsStr>>(
    lists: &[S],
    foreground: bool,
    merged: &Path,
    inherited: Inherited,
    complete: impl FnOnce(&mut MountOptions) -> crate::error::Result<()>,
) -> Result<(), Failure> {
    let (mut options, ignored) = MountOptions::parse(lists).map_err(Failure::usage)?;
    complete(&mut options).map_err(Failure::usage)?;
    start_log(&options)?;
    for ignored in ignored {
        debug!("{}: ignored, {}", ignored.option, ignored.why);
    }
    let foreground = foreground || options.debug;
    let spec = MountSpec::new(options, merged.to_owned()).map_err(Failure::usage)?;
    if foreground {
        server::run(&spec).map_err(Failure::run)
    } else {
        server::start(&spec, inherited).map_err(Failure::sentence)
    }
}

/// Directs the log where the options say. A daemon without a log file has none once it is ready.
fn start_log(options: &MountOptions) -> Result<(), Failure> {
    let mut level = match (options.log_level, std::env::var(LOG_VARIABLE)) {
        (Some(level), _) => level,
        (None, Ok(name)) if !name.is_empty() => parse_level(&name)
            .map_err(|error| Failure::usage(Error::invalid(LOG_VARIABLE, error.to_string())))?,
        _ => LevelFilter::WARN,
    };
    if options.debug {
        level = level.max(LevelFilter::DEBUG);
    }
    // The transport calls it an error that a request was interrupted before its reply.
    let transport = if level == LevelFilter::TRACE { level } else { LevelFilter::OFF };
    let targets = Targets::new().with_default(level).with_target("fuser", transport);
    let writer = match &options.log_file {
        Some(path) => BoxMakeWriter::new(Mutex::new(open_log(path)?)),
        None => BoxMakeWriter::new(std::io::stderr),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        // They would go to stderr, and panic when nobody reads it any more.
        .log_internal_errors(false)
        .with_writer(writer);
    let started = tracing_subscriber::registry().with(lines.with_filter(targets)).try_init();
    // A library user may have set up logging already; that one stays.
    drop(started);
    Ok(())
}

fn open_log(path: &Path) -> Result<File, Failure> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map_err(|error| {
        let errno = Error::from(Errno::from_io_error(&error).unwrap_or(Errno::IO));
        Failure::run(Error::invalid(
            format!("log_file={}", show_path(path)),
            format!("open: {errno}; name a file that can be written"),
        ))
    })
}
