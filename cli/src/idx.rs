//! IDX files, the format of MNIST: a big-endian header (magic number, one size a dimension), then one byte a value.
//! Gzip or raw, told apart by the first two bytes.

use candle_core::{Result, bail};
use std::io::Read;

/// Rows and columns of an image.
pub const SIDE: usize = 28;
/// Labels are 0 to 9.
pub const CLASSES: usize = 10;

/// The pixels of a file of 28x28 images, one image after the other. `name` is what errors call the file.
pub fn images(name: &str, file: &[u8]) -> Result<Vec<u8>> {
    let ([count, rows, cols], pixels) = read(name, file, 2051, "images")?;
    if [rows, cols] != [SIDE, SIDE] {
        bail!("{name}: holds images of {rows} x {cols} pixels, expected {SIDE} x {SIDE}");
    }
    if count == 0 {
        bail!("{name}: holds no images");
    }
    Ok(pixels)
}

/// The labels of a label file, each checked to be 0 to 9.
pub fn labels(name: &str, file: &[u8]) -> Result<Vec<u8>> {
    let ([_], labels) = read(name, file, 2049, "labels")?;
    if let Some((i, label)) = labels.iter().enumerate().find(|&(_, &l)| usize::from(l) >= CLASSES) {
        bail!("{name}: label {label} at position {i}, expected 0 to {}", CLASSES - 1);
    }
    Ok(labels)
}

/// Unpacks a file and checks its magic number and its length: the sizes of the header and the bytes after it.
fn read<const DIMS: usize>(
    name: &str,
    file: &[u8],
    magic: u32,
    what: &str,
) -> Result<([usize; DIMS], Vec<u8>)> {
    let mut data = unpack(name, file)?;
    let header = 4 * (1 + DIMS);
    if data.len() < header {
        bail!("{name}: holds {} bytes, less than the {header} of an IDX header", data.len());
    }
    let body = data.split_off(header);
    let mut words = data.chunks_exact(4).map(|c| c.iter().fold(0u32, |word, &b| (word << 8) | u32::from(b)));
    let found = words.next().unwrap_or(0);
    if found != magic {
        bail!("{name}: magic number {found}, expected {magic} (IDX {what})");
    }
    let sizes: [usize; DIMS] = std::array::from_fn(|_| words.next().unwrap_or(0) as usize);
    let expected = sizes.iter().map(|&n| n as u128).product::<u128>();
    if body.len() as u128 != expected {
        let promised = sizes.map(|n| n.to_string()).join(" x ");
        bail!("{name}: {} bytes after the header, expected {expected} ({promised})", body.len());
    }
    Ok((sizes, body))
}

/// The bytes of a file, unpacked if it is gzip.
pub fn unpack(name: &str, file: &[u8]) -> Result<Vec<u8>> {
    if !file.starts_with(&[0x1f, 0x8b]) {
        return Ok(file.to_vec());
    }
    let mut data = Vec::new();
    match flate2::read::MultiGzDecoder::new(file).read_to_end(&mut data) {
        Ok(_) => Ok(data),
        Err(e) => bail!("{name}: cannot be unpacked as gzip ({e}); the file is damaged or incomplete"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sentence::sentence;
    use std::io::Write;

    fn idx(words: &[u32], body: &[u8]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_be_bytes()).chain(body.iter().copied()).collect()
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(data).unwrap();
        packed.finish().unwrap()
    }

    #[test]
    fn reads_raw_and_gzip() {
        let pixels: Vec<u8> = (0..2 * 784).map(|i| (i % 251) as u8).collect();
        let raw = idx(&[2051, 2, 28, 28], &pixels);
        assert_eq!(images("i", &raw).unwrap(), pixels);
        assert_eq!(images("i", &gzip(&raw)).unwrap(), pixels);
        let raw = idx(&[2049, 3], &[9, 0, 4]);
        assert_eq!(labels("l", &raw).unwrap(), [9, 0, 4]);
        // Two members in one gzip file, as parallel packers write them.
        let parts = [gzip(&raw[..5]), gzip(&raw[5..])].concat();
        assert_eq!(labels("l", &parts).unwrap(), [9, 0, 4]);
    }

    #[test]
    fn refuses_with_the_file_what_was_found_and_what_was_expected() {
        let image = vec![0u8; 784];
        let huge = idx(&[2051, u32::MAX, u32::MAX, u32::MAX], &image);
        let packed = gzip(&idx(&[2051, 1, 28, 28], &image));
        for (file, message) in [
            (vec![], "f: holds 0 bytes, less than the 16 of an IDX header"),
            (idx(&[2049, 1, 28, 28], &image), "f: magic number 2049, expected 2051 (IDX images)"),
            (idx(&[2051, 1, 32, 28], &[0; 896]), "f: holds images of 32 x 28 pixels, expected 28 x 28"),
            (idx(&[2051, 0, 28, 28], &[]), "f: holds no images"),
            (idx(&[2051, 2, 28, 28], &image), "f: 784 bytes after the header, expected 1568 (2 x 28 x 28)"),
            (idx(&[2051, 1, 28, 28], &[0; 785]), "f: 785 bytes after the header, expected 784 (1 x 28 x 28)"),
            (huge, "f: 784 bytes after the header, expected 79228162458924105385300197375"),
            (packed[..packed.len() - 9].to_vec(), "f: cannot be unpacked as gzip"),
        ] {
            let error = sentence(&images("f", &file).unwrap_err());
            assert!(error.starts_with(message), "{error}\n  expected {message}");
        }
        for (file, message) in [
            (idx(&[2051, 1], &[0]), "f: magic number 2051, expected 2049 (IDX labels)"),
            (idx(&[2049, 3], &[0, 10, 1]), "f: label 10 at position 1, expected 0 to 9"),
        ] {
            assert_eq!(sentence(&labels("f", &file).unwrap_err()), message);
        }
    }
}
