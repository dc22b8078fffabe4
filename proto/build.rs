//! Compiles the `.proto` files, without a protoc on the host, and lists what is in them for the test that keeps their
//! numbers as they are.

// Standard output is how cargo is told.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::Path;
use std::{env, fs};
use tonic_prost_build::FileDescriptorSet;

const FILES: [&str; 3] = ["types.proto", "admin.proto", "pairing.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    let listing = Path::new(&env::var("OUT_DIR")?).join("v1.fields");
    fs::write(listing, list(&descriptors).join("\n") + "\n")?;
    tonic_prost_build::configure().bytes(".colo.v1.BootFileChunk.bytes").compile_fds(descriptors)?;
    Ok(())
}

/// One line for each field, value of an enum and method, sorted.
fn list(descriptors: &FileDescriptorSet) -> Vec<String> {
    let mut lines = Vec::new();
    for file in &descriptors.file {
        let mut enums: Vec<_> = file.enum_type.iter().collect();
        let mut messages: Vec<_> = file.message_type.iter().collect();
        while let Some(message) = messages.pop() {
            messages.extend(&message.nested_type);
            enums.extend(&message.enum_type);
            for field in &message.field {
                let label = field.label().as_str_name().trim_start_matches("LABEL_");
                let kind = match field.type_name() {
                    "" => field.r#type().as_str_name().trim_start_matches("TYPE_"),
                    name => name.trim_start_matches(".colo.v1."),
                };
                let of = format!("{}.{}", message.name(), field.name());
                lines.push(format!("{of} = {}: {} {kind}", field.number(), label.to_lowercase()));
            }
        }
        for choice in enums {
            let values = choice.value.iter();
            lines.extend(
                values.map(|value| format!("{}.{} = {}", choice.name(), value.name(), value.number())),
            );
        }
        for service in &file.service {
            lines.extend(service.method.iter().map(|method| {
                let streams = (method.client_streaming(), method.server_streaming());
                let types = (method.input_type(), method.output_type());
                format!("{}.{}: {types:?}, streams {streams:?}", service.name(), method.name())
            }));
        }
    }
    lines.sort();
    lines
}
