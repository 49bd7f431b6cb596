//! safetensors: the tensors of one file or of several shards, as views into the mapped bytes. Every offset, shape and
//! dtype of a header is checked against the file before a view is made, so that a [`Tensor`] always has exactly the
//! bytes that its shape and dtype call for. Alignment is not promised: headers may have any length.

use std::collections::{BTreeMap, BTreeSet};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::bytes::Bytes;
use crate::error::{Error, Result};

use super::files::Files;
use super::json::{Object, clipped};

/// The file of a checkpoint in one piece.
pub(super) const SINGLE: &str = "model.safetensors";

/// The list of shards of a checkpoint in several pieces.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The largest header that is parsed. A tensor takes about 120 bytes of it, and the largest Llama, quantized, has
/// 5,000 tensors; parsed JSON takes many times its size, so that a bound is needed.
const MAX_HEADER_BYTES: usize = 16 << 20;

/// What a repository holds in the place of a large file until it is fetched.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// The element types of tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorDType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// FP8 codes, see [`crate::e4m3`].
    E4m3,
    /// A type that this runtime does not compute with.
    Other(Dtype),
}

impl From<Dtype> for TensorDType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => TensorDType::F32,
            Dtype::F16 => TensorDType::F16,
            Dtype::BF16 => TensorDType::Bf16,
            Dtype::F8_E4M3 => TensorDType::E4m3,
            other => TensorDType::Other(other),
        }
    }
}

impl From<TensorDType> for Dtype {
    fn from(dtype: TensorDType) -> Self {
        match dtype {
            TensorDType::F32 => Dtype::F32,
            TensorDType::F16 => Dtype::F16,
            TensorDType::Bf16 => Dtype::BF16,
            TensorDType::E4m3 => Dtype::F8_E4M3,
            TensorDType::Other(other) => other,
        }
    }
}

impl std::fmt::Display for TensorDType {
    /// The name that safetensors has for it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Dtype::from(*self).fmt(f)
    }
}

/// A tensor of a checkpoint; cloning it clones no data.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its element type.
    pub dtype: TensorDType,
    /// Its dimensions, outermost first; none for a scalar.
    pub shape: Vec<usize>,
    /// Its elements, row-major and little-endian, in any alignment.
    pub data: Bytes,
}

impl Tensor {
    /// The elements as f32: exact from f32, f16 and bf16; an error for other types.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        Ok(match self.dtype {
            TensorDType::F32 => self.each(f32::from_le_bytes),
            TensorDType::F16 => self.each(|bytes| f16::from_le_bytes(bytes).to_f32()),
            TensorDType::Bf16 => self.each(|bytes| bf16::from_le_bytes(bytes).to_f32()),
            TensorDType::E4m3 | TensorDType::Other(_) => {
                return Err(Error::tensor(&self.name, format!("is {}; F32, F16 or BF16 is needed here", self.dtype)));
            }
        })
    }

    fn each<const N: usize>(&self, value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        self.data.as_chunks::<N>().0.iter().map(|bytes| value(*bytes)).collect()
    }

    /// The shape as an error message quotes it: a header may claim any number of dimensions.
    pub(super) fn shape_text(&self) -> String {
        clipped(&format!("{:?}", self.shape))
    }

    /// An error unless the shape is `shape`, which the config calls for.
    pub fn expect_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        let why = format!("has shape {}, config.json calls for {shape:?}; take both from one model", self.shape_text());
        Err(Error::tensor(&self.name, why))
    }
}

/// The tensors of a model by name: of `model.safetensors`, or else of the shards that the index lists.
pub(super) fn open(files: &Files) -> Result<BTreeMap<String, Tensor>> {
    if let Some(bytes) = files.get(SINGLE)? {
        return Ok(parse(SINGLE, &bytes)?.map(|tensor| (tensor.name.clone(), tensor)).collect());
    }
    match files.json(INDEX)? {
        Some(index) => open_shards(files, Object::root(INDEX, &index)?),
        None => {
            let why = format!("holds neither {SINGLE} nor {INDEX}; download the whole model, in safetensors format");
            Err(Error::checkpoint(files.name(), why))
        }
    }
}

fn open_shards(files: &Files, index: Object) -> Result<BTreeMap<String, Tensor>> {
    let map = index.required("weight_map", index.object("weight_map")?)?;
    let mut shard_of = BTreeMap::new();
    for name in map.keys() {
        shard_of.insert(name, map.required(name, map.text(name)?)?);
    }
    let shards: BTreeSet<&str> = shard_of.values().copied().collect();
    let mut missing = Vec::new();
    let mut tensors = BTreeMap::new();
    for shard in shards {
        let Some(bytes) = files.get(shard)? else {
            missing.push(shard);
            continue;
        };
        for tensor in parse(shard, &bytes)? {
            // A tensor that several shards hold is the one that the index points to.
            if shard_of.get(tensor.name.as_str()).is_none_or(|of| *of == shard) {
                tensors.insert(tensor.name.clone(), tensor);
            }
        }
    }
    if let [first, rest @ ..] = &missing[..] {
        let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
        let why = format!("lists {first}{more}, which the model does not hold; download the missing shards");
        return Err(Error::checkpoint(INDEX, why));
    }
    match shard_of.iter().find(|(name, _)| !tensors.contains_key(**name)) {
        None => Ok(tensors),
        Some((name, shard)) => {
            let why = format!("says that {} is in {shard}, which does not hold it; download both again", clipped(name));
            Err(Error::checkpoint(INDEX, why))
        }
    }
}

/// The tensors of one safetensors file, in any order.
fn parse(file: &str, bytes: &Bytes) -> Result<impl Iterator<Item = Tensor>> {
    let damaged = |why: String| Error::checkpoint(file, format!("{why}; download the file again"));
    if bytes.starts_with(LFS_POINTER) {
        let why = "is a Git LFS pointer instead of the file itself; run `git lfs pull` or download the file";
        return Err(Error::checkpoint(file, why));
    }
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(damaged(format!("has {} bytes, fewer than a safetensors header", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    let header = match usize::try_from(length) {
        Ok(length) if length <= rest.len() && length <= MAX_HEADER_BYTES => &rest[..length],
        Ok(length) if length <= rest.len() => {
            return Err(damaged(format!("has a header of {length} bytes, more than {MAX_HEADER_BYTES}")));
        }
        _ => {
            let why = format!("claims a header of {length} bytes and has {} behind the claim", rest.len());
            return Err(damaged(why));
        }
    };
    // Parsing the header alone checks dtypes, shapes, and that the tensors lie one behind the other without gap or
    // overlap. Their end is compared here, where the sum cannot overflow.
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|e| damaged(format!("has a header that cannot be used: {}", clipped(&e.to_string()))))?;
    let have = rest.len() - header.len();
    if metadata.data_len() != have {
        let why = format!("describes {} bytes of tensors and holds {have}", metadata.data_len());
        return Err(damaged(why));
    }
    let data = bytes.slice(8 + header.len()..bytes.len());
    Ok(metadata.offset_keys().into_iter().filter_map(move |name| {
        let info = metadata.info(&name)?;
        let (start, end) = info.data_offsets;
        Some(Tensor { dtype: info.dtype.into(), shape: info.shape.clone(), data: data.slice(start..end), name })
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::checkpoint::testing::{bf16, folder, safetensors, with_header};

    fn read(file: Vec<u8>) -> Result<Vec<Tensor>> {
        parse(SINGLE, &Bytes::from(file)).map(Iterator::collect)
    }

    fn refusal(file: Vec<u8>) -> String {
        read(file).unwrap_err().to_string()
    }

    fn small() -> Vec<u8> {
        safetensors(&[
            ("a", "F8_E4M3", &[3], &[0x38, 0xb8, 0x7e]),
            ("b", "BF16", &[2], &bf16(&[1.5, -2.0])),
            ("c", "F16", &[], &0x3555u16.to_le_bytes()),
            ("d", "F32", &[1, 1], &0.1f32.to_le_bytes()),
            ("e", "I64", &[0], &[]),
        ])
    }

    #[test]
    fn tensors_are_views_of_any_alignment_and_convert_exactly() {
        let tensors = read(small()).unwrap();
        let by_name = |name: &str| tensors.iter().find(|t| t.name == name).unwrap();
        assert_eq!(&*by_name("a").data, &[0x38, 0xb8, 0x7e]);
        assert_eq!(by_name("b").to_f32().unwrap(), [1.5, -2.0]);
        assert_eq!(by_name("c").to_f32().unwrap(), [0.333_251_95]);
        assert_eq!(by_name("d").to_f32().unwrap(), [0.1]);
        assert_eq!((by_name("d").dtype, &by_name("d").shape[..]), (TensorDType::F32, &[1, 1][..]));
        for (name, dtype) in [("a", "F8_E4M3"), ("e", "I64")] {
            assert_eq!(
                by_name(name).to_f32().unwrap_err().to_string(),
                format!("tensor {name}: is {dtype}; F32, F16 or BF16 is needed here")
            );
        }
    }

    #[test]
    fn a_shape_that_disagrees_with_the_config_is_named() {
        let tensors = read(small()).unwrap();
        assert_eq!(
            tensors.iter().find(|t| t.name == "b").unwrap().expect_shape(&[3]).unwrap_err().to_string(),
            "tensor b: has shape [2], config.json calls for [3]; take both from one model"
        );
    }

    #[test]
    fn lying_headers_are_refused() {
        let tensor = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let again = "; download the file again";
        for (file, why) in [
            (vec![1, 2, 3], "has 3 bytes, fewer than a safetensors header".to_owned()),
            (vec![0xff; 16], format!("claims a header of {} bytes and has 8 behind the claim", u64::MAX)),
            (
                [&(20u64 << 20).to_le_bytes()[..], &vec![b' '; 20 << 20]].concat(),
                "has a header of 20971520 bytes, more than 16777216".to_owned(),
            ),
            (with_header(&tensor("F32", "[1]", "[0,4]"), &[0; 3]), "describes 4 bytes of tensors and holds 3".into()),
            (with_header(&tensor("F32", "[1]", "[0,4]"), &[0; 5]), "describes 4 bytes of tensors and holds 5".into()),
        ] {
            assert_eq!(refusal(file), format!("model.safetensors: {why}{again}"));
        }
        let cannot = "model.safetensors: has a header that cannot be used: ";
        for (header, why) in [
            ("nonsense".to_owned(), "expected ident at line 1 column 2"),
            ("[]".to_owned(), "invalid type: sequence, expected"),
            (tensor("F99", "[1]", "[0,4]"), "unknown variant `F99`"),
            (tensor("F32", "[2]", "[0,4]"), "invalid shape, data type, or offset for tensor"),
            (tensor("F32", "[1]", "[4,0]"), "invalid offset for tensor `a`"),
            (tensor("F32", "[1]", "[-4,0]"), "invalid value: integer `-4`, expected usize"),
            (tensor("F32", "[4294967296,4294967296,4294967296]", "[0,4]"), "overflow computing buffer size"),
            (
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#
                    .to_owned(),
                "invalid offset for tensor `b`",
            ),
        ] {
            let message = refusal(with_header(&header, &[0; 6]));
            assert!(message.starts_with(cannot) && message.contains(why), "{header}: {message}");
            assert!(message.ends_with(again), "{message}");
        }
    }

    #[test]
    fn a_pointer_in_the_place_of_a_file_is_recognized() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n".to_vec();
        assert_eq!(
            refusal(pointer),
            "model.safetensors: is a Git LFS pointer instead of the file itself; run `git lfs pull` or download the file"
        );
    }

    #[test]
    fn offsets_that_add_up_to_the_end_of_memory_are_refused() {
        let size = (1u64 << 61) - 1;
        let tensors: Vec<String> = (0..8)
            .map(|i| {
                let (start, end) = (i * size, (i + 1) * size);
                format!(r#""t{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#)
            })
            .collect();
        assert_eq!(
            refusal(with_header(&format!("{{{}}}", tensors.join(",")), &[])),
            "model.safetensors: describes 18446744073709551608 bytes of tensors and holds 0; download the file again"
        );
    }

    #[test]
    fn a_file_truncated_anywhere_is_refused() {
        let whole = small();
        for length in 0..whole.len() {
            let message = refusal(whole[..length].to_vec());
            assert!(message.starts_with("model.safetensors: ") && message.ends_with("again"), "{length}: {message}");
        }
        assert_eq!(read(whole).unwrap().len(), 5);
    }

    /// Two shards: `one.safetensors` holds a and x, `two.safetensors` holds b and x.
    fn shards(map: serde_json::Value, present: &[&str]) -> Result<BTreeMap<String, Tensor>> {
        let one = safetensors(&[("a", "U8", &[1], &[1]), ("x", "U8", &[1], &[1])]);
        let two = safetensors(&[("b", "U8", &[1], &[2]), ("x", "U8", &[1], &[2])]);
        let index = json!({"metadata": {"total_size": 4}, "weight_map": map}).to_string();
        let all: [(&str, &[u8]); 4] =
            [("config.json", b"{}"), (INDEX, index.as_bytes()), ("one.safetensors", &one), ("two.safetensors", &two)];
        let some: Vec<_> = all.into_iter().filter(|(name, _)| present.contains(name)).collect();
        let (_dir, files) = folder(&[&[("config.json", &b"{}"[..])], &some[..]].concat());
        open(&files)
    }

    #[test]
    fn shards_are_read_as_their_index_says() {
        let map = json!({"a": "one.safetensors", "b": "two.safetensors", "x": "two.safetensors"});
        let tensors = shards(map, &[INDEX, "one.safetensors", "two.safetensors"]).unwrap();
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["a", "b", "x"]);
        assert_eq!(&*tensors["x"].data, &[2]);
    }

    #[test]
    fn an_index_that_does_not_fit_its_shards_is_refused() {
        let map = json!({"a": "one.safetensors", "b": "two.safetensors"});
        for (map, present, why) in [
            (
                map.clone(),
                &[INDEX, "two.safetensors"][..],
                "model.safetensors.index.json: lists one.safetensors, which the model does not hold; download the \
                 missing shards",
            ),
            (
                map,
                &[INDEX],
                "model.safetensors.index.json: lists one.safetensors and 1 more, which the model does not hold; \
                 download the missing shards",
            ),
            (
                json!({"a": "one.safetensors", "c": "one.safetensors"}),
                &[INDEX, "one.safetensors"],
                "model.safetensors.index.json: says that c is in one.safetensors, which does not hold it; download \
                 both again",
            ),
            (
                json!({"a": "../one.safetensors"}),
                &[INDEX],
                "../one.safetensors: is not a plain file name; a model's files lie side by side in its folder",
            ),
            (json!({"a": 1}), &[INDEX], "model.safetensors.index.json: `a` must be a string, found 1"),
            (
                json!(null),
                &[INDEX],
                "model.safetensors.index.json: `weight_map` is missing; take the file from the model's repository",
            ),
        ] {
            assert_eq!(shards(map, present).unwrap_err().to_string(), why);
        }
        let message = shards(json!({}), &[]).unwrap_err().to_string();
        let why = "holds neither model.safetensors nor model.safetensors.index.json; download the whole model, in \
                   safetensors format";
        assert!(message.ends_with(why), "{message}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(header in prop::collection::vec(any::<u8>(), 0..200), data in 0usize..64) {
            let file = [&(header.len() as u64).to_le_bytes()[..], &header, &vec![0; data]].concat();
            let _ = read(file);
            let _ = read(header);
        }

        #[test]
        fn no_change_of_a_valid_file_makes_the_parser_panic(at in 0usize..340, to in any::<u8>()) {
            let mut file = small();
            let at = at % file.len();
            file[at] = to;
            for tensor in read(file).unwrap_or_default() {
                let _ = tensor.to_f32();
            }
        }
    }
}
