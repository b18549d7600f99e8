//! `blockferry dd`: copies a part of an image, said in blocks, to a new image of any format. Operands are those of
//! `qemu-img dd`; the copying is `convert`'s, with its marks and its care for what is there.

use clap::Args;

use super::Global;
use super::convert::{ConvertArgs, Window, run};
use super::exit::{Exit, Failure};
use super::image::{GateArgs, NamingArgs, ServerArgs, parse_format, size};
use super::tool::{PlanArgs, with_code};
use crate::engine::Format;

/// Bytes of a block at most.
const BLOCK_BYTES_MAX: u64 = (1 << 31) - 1;

const AFTER: &str = "\
Operands:
  if=INPUT    the image to copy
  of=OUTPUT   the new image
  bs=SIZE     bytes of a block [default: 512]
  count=N     end after so many blocks of the input, counted from its beginning
  skip=N      leave out so many blocks at the beginning

Examples:
  The second MiB of an image, as a raw file:
      blockferry dd bs=1M skip=1 count=2 if=disk.qcow2 of=part.raw";

/// Copy a part of an image, said in blocks
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct DdArgs {
    /// What to copy, as NAME=VALUE
    #[arg(value_name = "OPERAND", required = true)]
    operands: Vec<String>,
    /// Format of the input, if its header should not be asked
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// Format of the output
    #[arg(short = 'O', long, value_name = "FORMAT", value_parser = parse_format, default_value = "raw")]
    output_format: Format,
    /// Open the input though others may be writing it: no locks
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Make an existing output anew; what is in it is lost
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    gate: GateArgs,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

/// What the operands say.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Operands {
    input: String,
    output: String,
    block_bytes: u64,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn parse(words: &[String]) -> Result<Operands, String> {
        let (mut input, mut output) = (None, None);
        let (mut block_bytes, mut count, mut skip) = (512, None, 0);
        for word in words {
            let Some((name, value)) = word.split_once('=') else {
                return Err(format!("'{word}' is no operand: say NAME=VALUE, such as if=disk.qcow2"));
            };
            let number = || size(value).map_err(|error| format!("{name}: {error}"));
            match name {
                "if" => input = Some(value.to_owned()),
                "of" => output = Some(value.to_owned()),
                "bs" => block_bytes = number()?,
                "count" => count = Some(number()?),
                "skip" => skip = number()?,
                _ => return Err(format!("'{name}' is no operand: if, of, bs, count and skip are")),
            }
        }
        if !(1..=BLOCK_BYTES_MAX).contains(&block_bytes) {
            return Err(format!("A block has from 1 to {BLOCK_BYTES_MAX} bytes, and not {block_bytes}"));
        }
        match (input, output) {
            (Some(input), Some(output)) => Ok(Operands { input, output, block_bytes, count, skip }),
            _ => Err("Say what to copy, and where to: if=INPUT of=OUTPUT".into()),
        }
    }

    /// Blocks are counted from the beginning of the input, those that are left out included.
    fn window(&self) -> Window {
        let bytes = |blocks: u64| blocks.saturating_mul(self.block_bytes);
        Window { from: bytes(self.skip), to: self.count.map_or(u64::MAX, bytes) }
    }
}

/// Runs the command.
pub fn main(global: &Global, args: DdArgs) -> Result<Exit, Failure> {
    let operands = match Operands::parse(&args.operands) {
        Ok(operands) => operands,
        Err(text) => return with_code(global, 2, Err(Failure::Text(text))),
    };
    let window = operands.window();
    let input = args.naming.read(&operands.input, args.format)?;
    let mut copy = ConvertArgs::plain(input, operands.output, (args.format, args.output_format));
    (copy.force_share, copy.force) = (args.force_share, args.force);
    copy.quiet = global.quiet;
    (copy.server, copy.gate, copy.plan) = (args.server, args.gate, args.plan);
    run(global, copy, Some(window))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Operands, String> {
        Operands::parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn operands_say_a_window() {
        let window = |line: &str| parse(line).map(|operands| (operands.window().from, operands.window().to));
        assert_eq!(window("if=a of=b"), Ok((0, u64::MAX)));
        assert_eq!(window("if=a bs=1k skip=3 of=b"), Ok((3072, u64::MAX)));
        assert_eq!(window("if=a=b bs=1000 count=3 skip=1 of=b"), Ok((1000, 3000)));
        assert_eq!(window("if=a of=b bs=2 skip=16E"), Err("skip: '16E' is too large for a size".into()));
        assert_eq!(window("if=a of=b bs=2 skip=15E"), Ok((u64::MAX, u64::MAX)));
        for bad in [
            "if=a",
            "of=b",
            "if=a of=b bs=0",
            "if=a of=b bs=2G",
            "if=a of=b conv=x",
            "if=a of=b x",
            "if=a of=b count=-1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
