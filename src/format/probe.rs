//! stub
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format { Raw }
impl Format { pub fn parse(t: &str) -> Option<Format> { (t == "raw").then_some(Format::Raw) } }
