//! The program `vhost-blk`.

use std::io::Write;
use std::process::ExitCode;

use vhost_blk::cli::{self, Cli, Command, Stop};

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(Stop::Print(text)) => {
            // A reader that went away (`| head`) is no error.
            let _ = std::io::stdout().write_all(text.as_bytes());
            return ExitCode::SUCCESS;
        }
        Err(Stop::Usage(line)) => {
            eprintln!("vhost-blk: {line}");
            return ExitCode::from(2);
        }
    };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let result = match cli {
        #[cfg(feature = "demo")]
        Cli { command: Some(Command::Demo(args)), .. } => vhost_blk::demo::run(args),
        Cli { command: Some(Command::Serve(args)), .. } | Cli { command: None, serve: args } => {
            args.settings().map(|_| ())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("vhost-blk: {line}");
            ExitCode::FAILURE
        }
    }
}
