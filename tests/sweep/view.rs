//! What a disk shows, as a plain model: bytes in pages that copies share, and zeroes where there is no page.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

const PAGE: u64 = 4096;

/// The content of a disk.
#[derive(Clone, Debug, Default)]
pub struct View {
    len: u64,
    pages: BTreeMap<u64, Rc<[u8; PAGE as usize]>>,
}

impl View {
    /// All zeroes.
    pub fn zeroes(len: u64) -> View {
        View { len, pages: BTreeMap::new() }
    }

    /// Bytes of the disk.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Puts bytes at an offset.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.len, "a change lies within the disk");
        self.pieces(offset, bytes.len() as u64, |page, at, range| {
            Rc::make_mut(page)[at.clone()].copy_from_slice(&bytes[range]);
        });
    }

    /// Puts zeroes at an offset.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let (end, mut at) = (offset + len, offset);
        while at < end {
            let (number, within) = (at / PAGE, at % PAGE);
            let n = (PAGE - within).min(end - at);
            if n == PAGE {
                // Whole pages at once: disks of gigabytes are zeroed, too.
                let last = end / PAGE;
                let gone: Vec<u64> = self.pages.range(number..last).map(|(number, _)| *number).collect();
                gone.iter().for_each(|number| drop(self.pages.remove(number)));
                at = last * PAGE;
                continue;
            }
            if let Some(page) = self.pages.get_mut(&number) {
                Rc::make_mut(page)[within as usize..(within + n) as usize].fill(0);
            }
            at += n;
        }
    }

    /// The bytes of a range.
    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        for (number, page) in self.pages.range(offset / PAGE..(offset + len).div_ceil(PAGE)) {
            let start = (number * PAGE).max(offset);
            let end = ((number + 1) * PAGE).min(offset + len);
            let within = (start - number * PAGE) as usize..(end - number * PAGE) as usize;
            bytes[(start - offset) as usize..(end - offset) as usize].copy_from_slice(&page[within]);
        }
        bytes
    }

    /// Another length: what is added is zeroes, what is cut off is forgotten.
    pub fn resize(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
            // Of the last page, what is left is zeroes, too.
            self.pages.split_off(&len.div_ceil(PAGE));
        }
        self.len = len;
    }

    /// This one where it has something to say, and `below` behind its end: what a base shows after a commit.
    pub fn over(&self, below: &View) -> View {
        let mut merged = self.clone();
        if below.len > self.len {
            merged.len = below.len;
            for number in below.pages.range(self.len / PAGE..).map(|(number, _)| *number) {
                let start = (number * PAGE).max(self.len);
                let end = ((number + 1) * PAGE).min(below.len);
                merged.write(start, &below.read(start, end - start));
            }
        }
        merged
    }

    /// Writes it to a file, with holes, that holds `saved` so far: pages that both share are there.
    pub fn save(&self, path: &str, saved: &mut View) {
        let file = File::options().create(true).write(true).truncate(false).open(path).expect("a file");
        // What lies behind a shorter end is gone.
        file.set_len(saved.len.min(self.len)).and_then(|()| file.set_len(self.len)).expect("its length");
        let write = |number: u64, page: &[u8]| {
            let n = PAGE.min(self.len - number * PAGE) as usize;
            file.write_all_at(&page[..n], number * PAGE).expect("a write");
        };
        for (number, page) in &self.pages {
            if saved.pages.get(number).is_none_or(|there| !Rc::ptr_eq(there, page)) {
                write(*number, &page[..]);
            }
        }
        for number in saved.pages.keys().filter(|number| *number * PAGE < self.len) {
            if !self.pages.contains_key(number) {
                write(*number, &[0; PAGE as usize]);
            }
        }
        *saved = self.clone();
    }

    fn pieces(
        &mut self,
        offset: u64,
        len: u64,
        mut change: impl FnMut(&mut Rc<[u8; PAGE as usize]>, std::ops::Range<usize>, std::ops::Range<usize>),
    ) {
        let mut done = 0;
        while done < len {
            let (number, within) = ((offset + done) / PAGE, (offset + done) % PAGE);
            let n = (PAGE - within).min(len - done);
            let page = self.pages.entry(number).or_insert_with(|| Rc::new([0; PAGE as usize]));
            change(page, within as usize..(within + n) as usize, done as usize..(done + n) as usize);
            done += n;
        }
    }
}
