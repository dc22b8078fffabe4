//! Compiles the calls of etcd's API that Colo makes, without a protoc on the host.

// Standard output is how cargo is told.
#![allow(clippy::print_stdout)]

use std::error::Error;

const FILE: &str = "src/etcd/rpc.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={FILE}");
    let descriptors = protox::compile([FILE], ["."])?;
    tonic_prost_build::configure().build_server(false).compile_fds(descriptors)?;
    Ok(())
}
