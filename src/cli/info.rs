//! `blockferry info`: what an image is, and whether it is complete.

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{ServerArgs, parse_format, state_dir};
use super::{Global, config, stats};
use crate::base::units::fmt_bytes;
use crate::engine::{Engine, Format, ImageOptions};
use crate::protocol::mark::TargetMark;

/// Tell what an image is, and whether a copy to it was left incomplete
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// The image
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Its format, if it should not be guessed
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// Where unfinished targets that cannot carry a mark themselves were noted (as given to `mirror`)
    #[arg(long, value_name = "DIR")]
    state_dir: Option<std::path::PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Runs the command.
pub fn main(global: &Global, args: &InfoArgs) -> Result<Exit, Failure> {
    let engine = std::rc::Rc::new(Engine::new(&config(global))?);
    let server = args.server.options();
    let options = ImageOptions { format: args.format, lock: false, server, ..ImageOptions::read_only() };
    let (e, name, marks) = (engine.clone(), args.image.clone(), state_dir(args.state_dir.as_deref()));
    let (driver, mark) = engine.run(async move {
        let driver = e.open(&name, &options).await?.driver().clone();
        let mark = TargetMark::read(e.ring(), &driver, marks.as_deref()).await?;
        Ok::<_, Failure>((driver, mark))
    })?;
    let limits = driver.limits();
    if global.json {
        println!(
            "{}",
            json!({
                "filename": args.image,
                "format": "raw",
                "driver": driver.kind(),
                "virtual-size": driver.len(),
                "actual-size": driver.allocated_bytes(),
                "request-alignment": limits.request_align,
                "state": if mark.is_some() { "incomplete" } else { "unmarked" },
                "mark": mark,
            })
        );
    } else {
        println!("image:            {}", args.image);
        println!("driver:           {}", driver.kind());
        println!("virtual size:     {} ({} bytes)", fmt_bytes(driver.len()), driver.len());
        if let Some(allocated) = driver.allocated_bytes() {
            println!("disk size:        {}", fmt_bytes(allocated));
        }
        println!("alignment:        {} bytes", limits.request_align);
        match mark {
            None => println!("state:            no mark: not the target of an unfinished copy"),
            Some(mark) => println!("state:            INCOMPLETE: target of an unfinished copy ({mark})"),
        }
    }
    stats::print(global, engine.ring());
    Ok(Exit::Done)
}
