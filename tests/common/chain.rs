//! Chains of images that QEMU made: each layer over a raw base holds random pieces of data and zeroes of its own.

use super::image::{Dice, MIB, Scratch, pattern};
use super::tool;

/// Bytes of the disk.
pub const LEN: u64 = 8 * MIB;
const UNIT: u64 = 4096;

/// A chain of `layers` images over a raw base, each with random pieces of its own; and what the uppermost shows.
#[derive(Debug)]
pub struct Chain {
    /// The folder.
    pub scratch: Scratch,
    /// Of the files, from the lowest up.
    pub names: Vec<String>,
    /// What the uppermost shows.
    pub model: Vec<u8>,
}

impl Chain {
    /// `options` are those of `qemu-img create -o` for each layer, from the lowest overlay up.
    pub fn new(seed: u64, options: &[&str]) -> Chain {
        let scratch = Scratch::new();
        let base = scratch.path("base.raw");
        let mut model = vec![0; LEN as usize];
        pattern(0, seed, &mut model[..(LEN / 2) as usize]);
        std::fs::write(&base, &model).expect("a base");
        let mut names = vec!["base.raw".to_owned()];
        let mut dice = Dice::new(seed);
        for (i, options) in options.iter().enumerate() {
            let (name, below) = (format!("l{i}.qcow2"), names.last().expect("one").clone());
            let format = if i == 0 { "raw" } else { "qcow2" };
            let path = scratch.path(&name);
            let mut args = vec!["create", "-q", "-f", "qcow2", "-F", format, "-b", &below];
            if !options.is_empty() {
                args.extend(["-o", options]);
            }
            args.push(&path);
            tool("qemu-img", &args);
            let mut commands: Vec<String> = Vec::new();
            for _ in 0..12 {
                let at = dice.below(LEN / UNIT - 32) * UNIT;
                let len = (1 + dice.below(32)) * UNIT;
                let range = at as usize..(at + len) as usize;
                match dice.below(4) {
                    0 => {
                        commands.push(format!("write -z {at} {len}"));
                        model[range].fill(0);
                    }
                    _ => {
                        let byte = 1 + dice.below(255) as u8;
                        commands.push(format!("write -P {byte} {at} {len}"));
                        model[range].fill(byte);
                    }
                }
            }
            let mut args = vec!["-f", "qcow2"];
            commands.iter().for_each(|command| args.extend(["-c", command.as_str()]));
            args.push(&path);
            tool("qemu-io", &args);
            names.push(name);
        }
        Chain { scratch, names, model }
    }

    /// The path of a layer; 0 is the base.
    pub fn path(&self, layer: usize) -> String {
        self.scratch.path(&self.names[layer])
    }

    /// The path of the uppermost.
    pub fn top(&self) -> String {
        self.path(self.names.len() - 1)
    }

    /// QEMU finds nothing wrong with any of `layers`, and reads the model through `path`.
    pub fn check(&self, path: &str, model: &[u8], layers: &[usize]) {
        for &layer in layers {
            tool("qemu-img", &["check", "-q", "-f", "qcow2", &self.path(layer)]);
        }
        let wanted = self.scratch.path("model.raw");
        std::fs::write(&wanted, model).expect("a model");
        let format = if path.ends_with(".raw") { "raw" } else { "qcow2" };
        tool("qemu-img", &["compare", "-q", "-f", format, "-F", "raw", path, &wanted]);
    }

    /// The backing files below `path`, as QEMU finds them.
    pub fn chain_of(&self, path: &str) -> Vec<String> {
        let text = tool("qemu-img", &["info", "--output=json", "--backing-chain", path]);
        let list: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
        let name = |value: &serde_json::Value| {
            let path = value["filename"].as_str().unwrap_or_default();
            path.rsplit('/').next().unwrap_or_default().to_owned()
        };
        list.iter().skip(1).map(name).collect()
    }
}
