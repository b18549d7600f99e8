//! NBD, with clients and servers that others wrote, and some that misbehave.

mod client;
mod export;
mod node;
mod remote;
