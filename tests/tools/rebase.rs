//! Safe rebases between backing files of any length and content: the image shows what it showed, whatever is below it
//! afterwards.

use super::{ours, qemu, qemu_json};
use common::image::{Dice, KIB, Scratch, content, difference};
use common::tool;

const OPTIONS: [&str; 5] = [
    "compat=1.1",
    "compat=0.10",
    "cluster_size=2M",
    "cluster_size=4k,extended_l2=off",
    "extended_l2=on,cluster_size=128k",
];

/// A raw file below an image: its length, and where there is data in it.
fn below(scratch: &Scratch, name: &str, dice: &mut Dice) -> String {
    let len = [64 * KIB, 300 * KIB + 512, 1024 * KIB, 1300 * KIB][dice.below(4) as usize];
    let data: Vec<_> = (0..dice.below(4))
        .map(|_| {
            let at = dice.below(len / 512 - 1) * 512;
            (at, (512 + dice.below(100) * 512).min(len - at))
        })
        .collect();
    scratch.holey(name, len, &data)
}

fn shown(scratch: &Scratch, image: &str) -> Vec<u8> {
    let raw = scratch.path("shown");
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, &raw]);
    content(&raw)
}

#[test]
fn a_rebase_holds_for_what_is_below_afterwards() {
    for (n, options) in OPTIONS.into_iter().cycle().take(20).enumerate() {
        let scratch = Scratch::new();
        let mut dice = Dice::new(n as u64);
        let image = scratch.path("image");
        let size = if dice.below(3) == 0 { "300k" } else { "1M" };
        below(&scratch, "old", &mut dice);
        below(&scratch, "new", &mut dice);
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", options];
        if n % 4 > 0 {
            create.extend(["-b", "old", "-F", "raw"]);
        }
        tool("qemu-img", &[&create[..], &[&image, size]].concat());
        let at = dice.below(200) * KIB;
        let write = format!("write -P 7 {at} 10k");
        let zero = format!("write -z {} 20k", dice.below(250) * KIB);
        tool("qemu-io", &["-f", "qcow2", "-c", &write, "-c", &zero, &image]);
        let before = shown(&scratch, &image);
        // To another one, to none, and back to what it had first.
        for backing in ["new", "", "old"] {
            let format: &[&str] = if backing.is_empty() { &[] } else { &["-F", "raw"] };
            ours(&[&["rebase", "-q", "-f", "qcow2", "-b", backing], format, &[&image]].concat());
            let after = shown(&scratch, &image);
            assert_eq!(difference(&before, &after), None, "story {n} with {options}, over '{backing}'");
            tool("qemu-img", &["check", "-q", "-f", "qcow2", &image]);
        }
    }
}

/// Down within its own chain, past a layer that ends early and hides what is below.
#[test]
fn a_rebase_within_the_chain_keeps_what_a_short_layer_hid() {
    let scratch = Scratch::new();
    let (base, mid, top) = (scratch.path("base"), scratch.path("mid"), scratch.path("top"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &base, "320k"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x61 0 320k", &base]);
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", &mid, "100k"]);
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", &top, "320k"]);
    let before = shown(&scratch, &top);
    ours(&["rebase", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", &top]);
    assert_eq!(difference(&before, &shown(&scratch, &top)), None);
}

/// Clusters are compressed as wholes, however small the piece is that differs, and whatever else they are made of.
#[test]
fn what_a_rebase_compresses_are_whole_clusters() {
    let scratch = Scratch::new();
    let [new, old, top, shown] = ["new", "old", "top", "shown"].map(|name| scratch.path(name));
    for (options, compressed) in [
        ("cluster_size=512", 128),
        ("cluster_size=2k", 32),
        ("cluster_size=64k", 2),
        ("cluster_size=1M,extended_l2=on", 2),
        ("cluster_size=64k,extended_l2=on,preallocation=metadata", 2),
    ] {
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &new, "3M"]);
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &new, "-F", "qcow2", &old]);
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "-b", &old, "-F", "qcow2", &top]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 1M", &new]);
        let write = ["-c", "write -P 2 992k 32k", "-c", "write -P 3 2M 32k", "-c", "write -z 1M 64k"];
        tool("qemu-io", &[&["-f", "qcow2"], &write[..], &[old.as_str()]].concat());
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 4 2112k 2k", &top]);
        tool("qemu-img", &["convert", "-O", "raw", &top, &shown]);
        ours(&["rebase", "-q", "-c", "-f", "qcow2", "-b", &new, "-F", "qcow2", &top]);
        let same = qemu(&["compare", "-f", "qcow2", "-F", "raw", &top, &shown]);
        assert_eq!(same.code, Some(0), "{options}: {same}");
        let found = qemu_json(&["check", "--output=json", "-f", "qcow2", &top]);
        assert!(found["corruptions"].is_null() && found["leaks"].is_null(), "{options}: {found}");
        assert_eq!(found["compressed-clusters"], compressed, "{options}: {found}");
    }
}
