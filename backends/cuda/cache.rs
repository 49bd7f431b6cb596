//! What is compiled once and kept: cubins, and the emulator. A file's name says what it was made from, so that a stale one
//! is never taken; it is written beside its place and renamed.

use std::path::PathBuf;
use std::{env, fs};

use quaver_core::{Error, Result};

/// The folder: `QUAVER_CACHE`, or `quaver` in the user's cache folder. Made where it is missing.
pub fn folder() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let home = || set("HOME").or_else(|| set("USERPROFILE")).map(|home| home.join(".cache"));
    let user = || set("XDG_CACHE_HOME").or_else(|| set("LOCALAPPDATA")).or_else(home);
    let Some(folder) = set("QUAVER_CACHE").or_else(|| user().map(|path| path.join("quaver"))) else {
        return Err(Error::device("cuda", "there is no folder to keep compiled kernels in; set QUAVER_CACHE"));
    };
    fs::create_dir_all(&folder).map_err(|e| Error::io("write", &folder, e))?;
    Ok(folder)
}

/// A name made of what something was compiled from: 128 bits of FNV-1a over each text and its length.
pub fn key<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    // Constants of the 128-bit variant (Fowler, Noll, Vo; draft-eastlake-fnv, section 2).
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let mix = |hash: u128, byte: u8| (hash ^ u128::from(byte)).wrapping_mul(PRIME);
    let hash = texts.into_iter().fold(BASIS, |hash, text| {
        let length = (text.len() as u64).to_le_bytes();
        length.into_iter().chain(text.bytes()).fold(hash, mix)
    });
    format!("{hash:032x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_on_every_text_and_where_each_ends() {
        let keys = [key(["ab", "c"]), key(["a", "bc"]), key(["abc"]), key(["ab", "d"]), key([])];
        assert!(keys.iter().enumerate().all(|(i, a)| keys[..i].iter().all(|b| a != b)), "{keys:?}");
        assert_eq!(key(["ab", "c"]), keys[0]);
    }
}
