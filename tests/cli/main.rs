//! The command as a person or a script sees it: exit codes, texts, what is left on disk.

mod bench;
mod chain;
mod command;
mod demo;
mod ends;
mod forbidden;
mod locks;
mod unprivileged;
