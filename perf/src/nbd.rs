//! NBD servers: random reads and writes of 4 KiB at several depths and large reads, over a Unix socket.
//!
//! The client is fio, which belongs to nobody here; at depth 16 `blockferry bench` is a second one, for the case that
//! fio's own way of reading replies is what limits. A server is started anew for each run, and its CPU time counted over
//! the client's.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::disks::{Content, Loop, Mount, drop_cache};
use crate::process::{Counter, Daemon, machine_busy_secs, run as run_tool};
use crate::result::Role;
use crate::rounds::{Contender, Context, Values, interleave};
use crate::{Fallible, copy};

/// One load.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub name: &'static str,
    write: bool,
    kib: u32,
    depth: u32,
    /// The client is `blockferry bench` instead of fio.
    own_client: bool,
}

const fn case(name: &'static str, write: bool, kib: u32, depth: u32) -> Case {
    Case { name, write, kib, depth, own_client: false }
}

/// All loads.
pub const CASES: &[Case] = &[
    case("read 4 KiB, depth 1", false, 4, 1),
    case("read 4 KiB, depth 16", false, 4, 16),
    case("read 4 KiB, depth 64", false, 4, 64),
    case("write 4 KiB, depth 1", true, 4, 1),
    case("write 4 KiB, depth 16", true, 4, 16),
    case("write 4 KiB, depth 64", true, 4, 64),
    case("read 256 KiB, depth 16", false, 256, 16),
    Case { own_client: true, ..case("read 4 KiB, depth 16, blockferry bench as client", false, 4, 16) },
    Case { own_client: true, ..case("read 4 KiB, depth 64, blockferry bench as client", false, 4, 64) },
    Case { own_client: true, ..case("read 256 KiB, depth 16, blockferry bench as client", false, 256, 16) },
];

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

struct Server {
    name: &'static str,
    role: Role,
    line: &'static str,
}

const SERVERS: &[Server] = &[
    Server {
        name: "blockferry serve",
        role: Role::Ours,
        line: "BLOCKFERRY --json --stats serve -f raw DEV --export nbd+unix:///?socket=SOCK",
    },
    Server {
        name: "qemu-nbd, io_uring",
        role: Role::Peer,
        line: "qemu-nbd -t -f raw --cache=none --aio=io_uring -k SOCK DEV",
    },
    Server {
        name: "QSD with iothread, io_uring",
        role: Role::Peer,
        line: "qemu-storage-daemon --object iothread,id=io0 \
               --blockdev driver=raw,node-name=d,file.driver=host_device,file.filename=DEV,file.aio=io_uring,file.cache.direct=on \
               --nbd-server addr.type=unix,addr.path=SOCK --export type=nbd,id=e,node-name=d,name=,writable=on,iothread=io0",
    },
    Server { name: "nbdkit file", role: Role::Buffered, line: "nbdkit -f -U SOCK file DEV" },
];

/// Runs the scenario.
pub fn run(cx: &mut Context, scenario: &str) -> Fallible<()> {
    let bytes = if cx.quick { 512 << 20 } else { 4u64 << 30 };
    let secs = if cx.quick { 1 } else { 2 };
    let tmpfs = Mount::tmpfs(&cx.folder.join("tmpfs"), bytes + (64 << 20))?;
    let mut disk = Loop::new(&tmpfs.path().join("disk.img"), bytes)?;
    Content::Random(1).fill(disk.path(), bytes)?;
    for case in CASES.iter().filter(|case| cx.wants(case.name)).collect::<Vec<_>>() {
        disk.renew()?;
        let (folder, blockferry, is_counted) = (cx.folder.clone(), cx.blockferry.clone(), cx.counted);
        let entries = SERVERS.iter().map(|server| {
            let (disk, folder, blockferry) = (&disk, &folder, &blockferry);
            let client = client_line(case, secs, "blockferry", "SOCK");
            Contender {
                name: server.name.to_owned(),
                role: server.role,
                command: format!(
                    "{}; client: {}",
                    server.line.replace("BLOCKFERRY", "blockferry"),
                    client.join(" ")
                ),
                run: Box::new(move |warm_up| {
                    once(server, case, secs, disk.path(), folder, blockferry, warm_up && is_counted)
                }),
            }
        });
        let limits = (cx.rounds_or(6), cx.seconds_max, cx.only.as_slice());
        interleave(&mut cx.sink, limits, (scenario, case.name), entries.collect())?;
    }
    Ok(())
}

fn client_line(case: &Case, secs: u32, blockferry: &str, socket: &str) -> Vec<String> {
    let Case { write, kib, depth, own_client, .. } = case;
    if *own_client {
        let percent = if *write { 0 } else { 100 };
        let mut line = vec![blockferry.to_owned()];
        let load = format!("--json bench --quiet --overwrite -t {secs}s -d {depth} -b {kib}KiB -p {percent}");
        line.extend(words(&load));
        line.push(format!("nbd+unix:///?socket={socket}"));
        return line;
    }
    let rw = if *write { "randwrite" } else { "randread" };
    let mut line = words(&format!(
        "fio --name=c --ioengine=nbd --rw={rw} --bs={kib}k --iodepth={depth} --time_based --runtime={secs} \
         --norandommap --randrepeat=0 --output-format=json --percentile_list=50:99:99.9"
    ));
    line.push(format!("--uri=nbd+unix:///?socket={socket}"));
    line
}

fn once(
    server: &Server,
    case: &Case,
    secs: u32,
    disk: &Path,
    folder: &Path,
    blockferry: &str,
    count: bool,
) -> Fallible<Values> {
    let socket = folder.join("nbd.sock");
    let _ = std::fs::remove_file(&socket);
    drop_cache(disk)?;
    let place = |word: String| {
        word.replace("BLOCKFERRY", blockferry)
            .replace("DEV", &disk.display().to_string())
            .replace("SOCK", &socket.display().to_string())
    };
    let line: Vec<String> = words(server.line).into_iter().map(place).collect();
    let daemon = Daemon::start(&line, &folder.join("server.out"))?;
    daemon.until_listening(&socket)?;
    std::thread::sleep(Duration::from_millis(50));
    let counter = match count {
        true => Some(Counter::attach(daemon.pid(), &folder.join("counts"))?),
        false => None,
    };
    let client = client_line(case, secs, blockferry, &socket.display().to_string());
    let (cpu, busy) = (daemon.cpu_secs()?, machine_busy_secs()?);
    let ended = run_tool(&client, &folder.join("client.out"), &|| Ok(()))?;
    let (cpu, busy) = (daemon.cpu_secs()? - cpu, machine_busy_secs()? - busy);
    let mut values = if case.own_client { own_report(&ended.stdout)? } else { fio_report(&ended.stdout)? };
    let operations = values.remove("operations").ok_or("the client counted nothing")?.max(1.0);
    let mut put = |name: &str, value: f64| values.insert(name.to_owned(), value);
    put("cpu-us-an-io", cpu * 1e6 / operations);
    put("busy-us-an-io", busy * 1e6 / operations);
    put("rss-mib", daemon.rss_mib_max()?);
    if let Some((syscalls, switches)) = counter.map(Counter::end).transpose()?.flatten() {
        put("syscalls-an-io", syscalls / operations);
        put("switches-an-io", switches / operations);
    }
    let (_, output) = daemon.end(rustix::process::Signal::TERM)?;
    copy::add_own_counters(&mut values, &output);
    Ok(values)
}

/// What fio's JSON says.
pub fn fio_report(stdout: &str) -> Fallible<Values> {
    // Warnings may stand before it.
    let start = stdout.find('{').ok_or("fio printed no JSON")?;
    let report: Value = serde_json::from_str(&stdout[start..])?;
    let job = &report["jobs"][0];
    let kind =
        ["read", "write"].into_iter().find(|kind| job[*kind]["total_ios"].as_f64().unwrap_or(0.0) > 0.0);
    let side = &job[kind.ok_or("fio did nothing")?];
    if job["error"].as_i64() != Some(0) {
        return Err(format!("fio ended with error {}", job["error"]).into());
    }
    let of = |value: &Value| value.as_f64().ok_or("a number is missing in fio's report");
    let percentiles = &side["clat_ns"]["percentile"];
    Ok([
        ("iops", of(&side["iops"])?),
        ("operations", of(&side["total_ios"])?),
        ("p50-ms", of(&percentiles["50.000000"])? / 1e6),
        ("p99-ms", of(&percentiles["99.000000"])? / 1e6),
        ("p99.9-ms", of(&percentiles["99.900000"])? / 1e6),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into())
}

/// What the report of `blockferry bench` says.
pub fn own_report(stdout: &str) -> Fallible<Values> {
    let lines = stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut reports = lines.filter(|line| line["event"] == "report");
    let report = reports.next_back().ok_or("bench printed no report")?;
    let report = &report["report"];
    let total = &report["total"];
    let of = |value: &Value| value.as_f64().ok_or("a number is missing in the report of bench");
    let latency = &total["latency"];
    Ok([
        ("iops", of(&total["iops"])?),
        ("operations", of(&total["operations"])?),
        ("p50-ms", of(&latency["p50-ns"])? / 1e6),
        ("p99-ms", of(&latency["p99-ns"])? / 1e6),
        ("p99.9-ms", of(&latency["p99-9-ns"])? / 1e6),
        ("worst-ms", of(&latency["max-ns"])? / 1e6),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_clients_are_read() {
        let fio = "fio: a warning\n{\"jobs\":[{\"error\":0,\"read\":{\"total_ios\":0},\"write\":{\"total_ios\":50,\"iops\":25.0,\
                   \"clat_ns\":{\"percentile\":{\"50.000000\":1000000,\"99.000000\":2000000,\"99.900000\":3000000}}}}]}";
        let values = fio_report(fio).unwrap();
        assert_eq!((values["iops"], values["operations"], values["p99-ms"]), (25.0, 50.0, 2.0));
        assert!(fio_report("").is_err());
        assert!(fio_report(&fio.replace("\"error\":0", "\"error\":5")).is_err());
        let own = "{\"event\":\"report\",\"report\":{\"total\":{\"iops\":5,\"operations\":9,\"latency\":{\"p50-ns\":1,\
                   \"p99-ns\":2000000,\"p99-9-ns\":3,\"max-ns\":4}}}}\n{\"event\":\"stats\"}";
        assert_eq!(own_report(own).unwrap()["p99-ms"], 2.0);
        assert!(own_report("{}").is_err());
    }

    #[test]
    fn command_lines_name_what_varies() {
        let line = client_line(&CASES[1], 2, "b", "/s").join(" ");
        assert!(line.contains("--rw=randread --bs=4k --iodepth=16") && line.ends_with("socket=/s"), "{line}");
        let own = CASES.iter().find(|case| case.own_client).unwrap();
        assert!(
            client_line(own, 2, "b", "/s")
                .join(" ")
                .starts_with("b --json bench --quiet --overwrite -t 2s -d 16 -b 4KiB -p 100")
        );
    }
}
