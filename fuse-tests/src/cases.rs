//! Generated cases: layer stacks and operations, from a seed or from their printed form.

use std::fmt;

use crate::env;
use crate::images::Image;
use crate::ops::{Op, PATHS, Rng};
use crate::run::Config;

/// A layer stack and operations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Where it came from.
    pub seed: u64,
    /// Lines of each lower layer (see [`crate::fixture`]), bottom first.
    pub layers: Vec<Vec<String>>,
    /// What is done.
    pub ops: Vec<Op>,
}

impl Case {
    /// The case of a seed.
    pub fn generate(seed: u64, config: &Config) -> Case {
        let mut rng = Rng::new(seed);
        let style = Style { links: config.links, marks: false };
        let layers = generate_layers(&mut rng, 5, style);
        let ops = (0..config.ops).map(|_| Op::generate(&mut rng)).collect();
        let mut case = Case { seed, layers, ops };
        let cannot = config.image.map_or(&[][..], Image::cannot);
        case.ops.retain(|op| !cannot.contains(&op.verb));
        if let Some(lesser) = &config.lesser {
            case.ops.retain(|op| !lesser.cannot.contains(&op.verb));
            let cannot_hold = |line: &String| {
                lesser.cannot_hold.iter().any(|word| line.split(' ').next() == Some(*word))
            };
            for layer in &mut case.layers {
                layer.retain(|line| !cannot_hold(line));
            }
        }
        case
    }

    /// Reads a case from its printed form.
    ///
    /// # Errors
    /// A line that is no operation.
    pub fn parse(text: &str) -> Result<Case, String> {
        let mut case = Case { seed: 0, layers: Vec::new(), ops: Vec::new() };
        let mut in_ops = false;
        for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
            if let Some(seed) = line.strip_prefix("# seed ") {
                case.seed = seed.parse().map_err(|_| "seed")?;
            } else if line == "# layer" {
                case.layers.push(Vec::new());
            } else if line == "# operations" {
                in_ops = true;
            } else if in_ops {
                case.ops.push(line.parse()?);
            } else if let Some(layer) = case.layers.last_mut() {
                layer.push(line.into());
            }
        }
        Ok(case)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "# seed {}", self.seed)?;
        for layer in &self.layers {
            writeln!(f, "# layer")?;
            for line in layer {
                writeln!(f, "{line}")?;
            }
        }
        writeln!(f, "# operations")?;
        for op in &self.ops {
            writeln!(f, "{op}")?;
        }
        Ok(())
    }
}

/// What generated layers may hold.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Hard links between files of a layer.
    pub links: bool,
    /// xattr whiteouts.
    pub marks: bool,
}

/// Layers of up to `most` levels, bottom first.
pub fn generate_layers(rng: &mut Rng, most: usize, style: Style) -> Vec<Vec<String>> {
    let count = 1 + rng.below(most);
    (0..count).map(|level| generate_layer(rng, level, style)).collect()
}

fn generate_layer(rng: &mut Rng, level: usize, style: Style) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut dirs = vec![String::new()];
    let mut files: Vec<String> = Vec::new();
    let density = 25 + rng.below(50);
    for path in PATHS {
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        if !dirs.iter().any(|dir| dir == parent) || !rng.chance(density) {
            continue;
        }
        let has_children = PATHS.iter().any(|other| other.starts_with(&format!("{path}/")));
        let kind = rng.below(100);
        let mode = *rng.pick(&["644", "600", "755", "444", "777", "4755", "6777"]);
        match kind {
            _ if has_children && kind < 70 => {
                let mode = *rng.pick(&["755", "700", "1777", "2775"]);
                lines.push(format!("dir {path} {mode}"));
                dirs.push((*path).to_owned());
                if level > 0 && rng.chance(20) {
                    lines.push(format!("opaque {path}"));
                }
            }
            0..40 => {
                let content =
                    rng.pick(&["size:0", "size:5", "size:5000", "size:70000", "hole:70000"]);
                lines.push(format!("file {path} {mode} {content}"));
                files.push((*path).to_owned());
            }
            40..50 if style.links && !files.is_empty() => {
                lines.push(format!("link {path} {}", rng.pick(&files)));
            }
            40..58 => {
                let target = rng.pick(&["a", "b", "nowhere", "a/b"]);
                lines.push(format!("symlink {path} {target}"));
            }
            58..64 => lines.push(format!("fifo {path} {mode}")),
            64..68 => {
                lines.push(format!("dir {path} 755"));
            }
            68..75 if style.marks && level > 0 && env::is_root() => {
                lines.push(format!("xwhiteout {path}"));
                continue;
            }
            _ if level > 0 => {
                lines.push(format!("whiteout {path}"));
                continue;
            }
            _ => continue,
        }
        if rng.chance(15) {
            lines.push(format!("owner {path} 1000 {}", rng.pick(&[1000, 0, 2000])));
        }
        let plain = lines.last().is_some_and(|l| l.starts_with("file") || l.starts_with("dir"));
        if plain && rng.chance(15) {
            lines.push(format!("xattr {path} user.a lower{level}"));
        }
        if rng.chance(10) {
            let time = rng.pick(&["-1", "-2147483649.999999999", "5000000000.5", "0"]);
            lines.push(format!("mtime {path} {time}"));
        }
    }
    lines
}
