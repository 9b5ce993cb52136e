//! The program `vhost-blk`.
fn main() {}
