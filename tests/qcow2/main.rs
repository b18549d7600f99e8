//! qcow2 images of every make, against QEMU's tools and against whoever damages them.

mod hostile;
mod images;
mod lanes;
mod matrix;
mod mirror;
