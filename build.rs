//! Tells the crate which commit it is built from: `QUAVER_COMMIT` is its first twelve digits, `-dirty` behind them where
//! the sources differ from it, `unknown` where there is no git or this is no repository of its own.

use std::path::Path;
use std::process::Command;

/// What the binary is made of.
const SOURCES: [&str; 8] = ["Cargo.toml", "Cargo.lock", "build.rs", "core", "backends", "shaders", "kernels", "tools"];

fn main() {
    // Runs again where the sources or the commit changed, and so never without something to compile.
    for path in SOURCES {
        println!("cargo::rerun-if-changed={path}");
    }
    println!("cargo::rustc-env=QUAVER_COMMIT={}", commit().unwrap_or_else(|| "unknown".into()));
}

fn commit() -> Option<String> {
    // In another repository's folder the commit would be that one's.
    if !git(&["rev-parse", "--show-prefix"])?.is_empty() {
        return None;
    }
    let branch = git(&["symbolic-ref", "-q", "HEAD"]).unwrap_or_default();
    for file in ["HEAD", "logs/HEAD", "packed-refs", &branch] {
        // A file that is not there would count as changed in every build.
        if let Some(path) = git(&["rev-parse", "--git-path", file]).filter(|path| Path::new(path).is_file()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changes = git(&[&["--no-optional-locks", "status", "--porcelain", "--"], &SOURCES[..]].concat())?;
    Some(if changes.is_empty() { commit } else { commit + "-dirty" })
}

/// What a git command prints, without the line's end; None where it fails.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim_end().to_owned())
}
