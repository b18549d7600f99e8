//! `blockferry doctor`: what this machine allows, and what was chosen.

use std::path::PathBuf;

use blockferry_ring::uring;
use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::print::product;
use super::{Global, config};
use crate::base::os_name;
use crate::engine::{Engine, ImageOptions};

/// Tell what kernel, limits and filesystems allow here, and what was chosen
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Look at the filesystems or devices of these paths too (directories, files, block devices)
    #[arg(value_name = "PATH", value_parser = crate::cli::image::path)]
    paths: Vec<PathBuf>,
}

/// Runs the command.
pub fn main(global: &Global, args: &DoctorArgs) -> Result<Exit, Failure> {
    let kernel = read_line("/proc/sys/kernel/osrelease");
    let mut sections = vec![("kernel", vec![format!("Linux {kernel}")]), ("limits", limits())];
    let engine = match Engine::new(&config(global)) {
        Ok(engine) => engine,
        Err(error) => {
            sections.push(("io_uring", vec![error.to_string()]));
            print(global, &sections);
            return Err(error.into());
        }
    };
    sections.push(("io_uring, as chosen", engine.ring().describe()));
    sections.push(("io_uring, as offered", uring::probe()?));
    let mut paths = args.paths.clone();
    if paths.is_empty() {
        paths.push(PathBuf::from("."));
        paths.push(std::env::temp_dir());
    }
    let reports: Vec<(String, Vec<String>)> =
        paths.iter().map(|path| (format!("path {}", path.display()), path_report(&engine, path))).collect();
    for (name, lines) in &reports {
        sections.push((name, lines.clone()));
    }
    print(global, &sections);
    Ok(Exit::Done)
}

fn print(global: &Global, sections: &[(&str, Vec<String>)]) {
    if global.json {
        let map: serde_json::Map<String, serde_json::Value> =
            sections.iter().map(|(name, lines)| ((*name).to_owned(), json!(lines))).collect();
        product!("{}", serde_json::Value::Object(map));
        return;
    }
    for (name, lines) in sections {
        product!("{name}");
        for line in lines {
            product!("  {line}");
        }
    }
}

fn read_line(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn limits() -> Vec<String> {
    let limit = |name: &str, resource| {
        let limit = rustix::process::getrlimit(resource);
        let show = |value: Option<u64>| value.map_or_else(|| "unlimited".to_owned(), |v| v.to_string());
        format!("{name}: {} (hard: {})", show(limit.current), show(limit.maximum))
    };
    vec![
        limit("RLIMIT_MEMLOCK, bytes that may be registered", rustix::process::Resource::Memlock),
        limit("RLIMIT_NOFILE, open files", rustix::process::Resource::Nofile),
        format!("kernel.io_uring_disabled: {}", read_line("/proc/sys/kernel/io_uring_disabled")),
        format!("user id: {}", rustix::process::getuid().as_raw()),
        format!("CPUs: {}", std::thread::available_parallelism().map_or(0, std::num::NonZero::get)),
    ]
}

/// Tries things out on a scratch file in a directory, or looks at a file or device without writing to it.
fn path_report(engine: &Engine, path: &std::path::Path) -> Vec<String> {
    if path.is_dir() {
        return match scratch_report(engine, path) {
            Ok(lines) => lines,
            Err(error) => vec![format!("not writable: {error}")],
        };
    }
    let options = ImageOptions { lock: false, read_only: true, ..ImageOptions::raw() };
    match engine.open_as_said(&os_name::from_path(path), &options) {
        Ok(node) => describe(&**node.driver()),
        Err(error) => vec![error.to_string()],
    }
}

fn scratch_report(engine: &Engine, directory: &std::path::Path) -> Result<Vec<String>, Failure> {
    let path = directory.join(format!(".blockferry-doctor-{}", std::process::id()));
    let name = path.display().to_string();
    let ring = engine.ring().clone();
    let (make, at) = (ring.clone(), path.clone());
    engine.run(async move {
        crate::protocol::file::FileDriver::create(&make, &at, 1 << 20, Default::default()).await
    })?;
    let result = (|| {
        let node = engine.open_as_said(&name, &ImageOptions { lock: false, ..ImageOptions::raw() })?;
        let driver = node.driver().clone();
        let mut lines = describe(&*driver);
        let (d, r) = (driver.clone(), ring.clone());
        lines.extend(engine.run(async move {
            use crate::block::{WriteFlags, ZeroFlags};
            let mut lines = Vec::new();
            let mut answer = |what: &str, result: Result<(), crate::block::BlockError>| {
                lines.push(match result {
                    Ok(()) => format!("{what}: yes"),
                    Err(error) => format!("{what}: no ({})", error.errno),
                });
            };
            let buf = r.alloc(65_536).await.freeze();
            answer("write", d.write(0, buf.clone(), WriteFlags::default()).await);
            answer("write through (FUA)", d.write(0, buf, WriteFlags { fua: true }).await);
            let unmap = ZeroFlags { may_unmap: true, no_fallback: true, fua: false };
            answer("zero by giving space back (punch hole)", d.write_zeroes(0, 65_536, unmap).await);
            let zero = ZeroFlags { may_unmap: false, no_fallback: true, fua: false };
            answer("zero keeping space (zero range)", d.write_zeroes(65_536, 65_536, zero).await);
            answer("flush", d.flush().await);
            let extent = d.block_status(524_288, 4096).await;
            answer("holes are told from data", extent.map(drop));
            let mark =
                d.local_file().map(|file| r.set_attribute(&file, "user.blockferry.state", Some(b"doctor")));
            lines.push(match mark {
                Some(Ok(())) => "extended attributes (marks on targets): yes".to_owned(),
                Some(Err(errno)) => {
                    format!("extended attributes (marks on targets): no ({errno}); use --state-dir")
                }
                None => "extended attributes (marks on targets): no".to_owned(),
            });
            lines
        }));
        Ok(lines)
    })();
    let _ = engine.ring().unlink(&path);
    result
}

fn describe(driver: &dyn crate::block::Driver) -> Vec<String> {
    let limits = driver.limits();
    let can = driver.capabilities();
    let direct = limits.request_align > 1 || limits.mem_align > 1;
    vec![
        format!("driver: {}", driver.kind()),
        format!(
            "O_DIRECT: {} (requests aligned to {}, memory to {})",
            if direct { "yes" } else { "not needed, or refused" },
            limits.request_align,
            limits.mem_align
        ),
        format!("capabilities before trying: {can:?}"),
    ]
}
