//! The images: bundled, from a folder of IDX files, or downloaded; normalized batches in a seeded order.

use crate::idx::{self, SIDE};
#[cfg(any(feature = "datasets", test))]
use crate::sentence::sentence;
use candle_core::{DType, Device, Result, Tensor, bail};
use kronwake::nn::init::Stream;
use rayon::prelude::*;
use std::path::Path;

/// A set of images with its normalization.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Name {
    Mnist,
    FashionMnist,
}

impl Name {
    fn title(self) -> &'static str {
        match self {
            Self::Mnist => "MNIST",
            Self::FashionMnist => "Fashion-MNIST",
        }
    }

    /// Mean and standard deviation of the training set's pixels, on the scale 0 to 1.
    pub fn moments(self) -> (f64, f64) {
        match self {
            Self::Mnist => (0.1307, 0.3081),
            Self::FashionMnist => (0.2860, 0.3530),
        }
    }
}

/// Images and labels of the training or of the test set.
pub struct Part {
    /// `count x 28 x 28` bytes.
    pub pixels: Vec<u8>,
    pub labels: Vec<u8>,
}

/// Training and test set, normalized alike.
pub struct Data {
    pub title: String,
    pub train: Part,
    pub test: Part,
    /// Mean and standard deviation of the pixels, in [0, 1].
    pub moments: (f64, f64),
}

macro_rules! bundled {
    ($file:literal) => {
        ($file, include_bytes!(concat!("../../examples/data/fashion-mnist-6k/", $file, ".gz")).as_slice())
    };
}

impl Data {
    /// 6,000 training and 1,000 test images of Fashion-MNIST that are part of this program.
    pub fn bundled() -> Result<Self> {
        let train = Part::parse(bundled!("train-images-idx3-ubyte"), bundled!("train-labels-idx1-ubyte"))?;
        let test = Part::parse(bundled!("t10k-images-idx3-ubyte"), bundled!("t10k-labels-idx1-ubyte"))?;
        Ok(Self::new("Fashion-MNIST, bundled subset", train, test, Name::FashionMnist))
    }

    /// The four IDX files of `dir`, under their usual names, each gzip (with or without `.gz`) or raw.
    pub fn from_dir(dir: &Path, name: Name) -> Result<Self> {
        let part = |prefix: &str| {
            let images = open(dir, &format!("{prefix}-images"), "idx3-ubyte")?;
            let labels = open(dir, &format!("{prefix}-labels"), "idx1-ubyte")?;
            Part::parse((&images.0, &images.1), (&labels.0, &labels.1))
        };
        Ok(Self::new(
            &format!("{} from {}", name.title(), dir.display()),
            part("train")?,
            part("t10k")?,
            name,
        ))
    }

    /// What `--data-dir` and `--dataset` say: a folder, a download, or else the bundled set.
    pub fn open(dir: Option<&Path>, name: Option<Name>) -> Result<Self> {
        match (dir, name) {
            (None, None) => Self::bundled(),
            (Some(dir), name) => Self::from_dir(dir, name.unwrap_or(Name::Mnist)),
            (None, Some(name)) => Self::download(name),
        }
    }

    #[cfg(not(feature = "datasets"))]
    fn download(name: Name) -> Result<Self> {
        bail!(
            "{} is not bundled: give the folder of its four IDX files with --data-dir DIR, or build with --features datasets to have it downloaded",
            name.title()
        )
    }

    /// The full set by way of candle-datasets: from its cache, else from the network.
    #[cfg(feature = "datasets")]
    fn download(name: Name) -> Result<Self> {
        let loaded = match name {
            Name::Mnist => candle_datasets::vision::mnist::load(),
            Name::FashionMnist => candle_datasets::vision::fashion_mnist::load(),
        };
        let set = match loaded {
            Ok(set) => set,
            Err(e) => bail!(
                "{} cannot be downloaded: give the folder of its four IDX files with --data-dir DIR ({})",
                name.title(),
                sentence(&e)
            ),
        };
        let train = Part::from_tensors(&set.train_images, &set.train_labels)?;
        let test = Part::from_tensors(&set.test_images, &set.test_labels)?;
        Ok(Self::new(&format!("{}, downloaded", name.title()), train, test, name))
    }

    fn new(title: &str, train: Part, test: Part, name: Name) -> Self {
        let (mean, std) = name.moments();
        let (n, m) = (train.len(), test.len());
        let title = format!("{title}: {n} training, {m} test images, normalized by {mean}/{std}");
        Self { title, train, test, moments: name.moments() }
    }

    /// The images `[n, 1, 28, 28]`, normalized, and the labels `[n]` (u32) of the examples at `places` of `part`.
    pub fn batch(
        &self,
        part: &Part,
        places: &[usize],
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let (mean, std) = self.moments;
        let value = |byte: usize| (byte as f64 / 255.0 - mean) / std;
        let shape = (places.len(), 1, SIDE, SIDE);
        let images = if dtype == DType::F64 {
            Tensor::from_vec(part.gather(places, std::array::from_fn(value)), shape, device)?
        } else {
            Tensor::from_vec(part.gather(places, std::array::from_fn(|b| value(b) as f32)), shape, device)?
        };
        let labels: Vec<u32> = places.iter().map(|&i| u32::from(part.labels[i])).collect();
        Ok((images.to_dtype(dtype)?, Tensor::from_vec(labels, places.len(), device)?))
    }
}

impl Part {
    fn parse(images: (&str, &[u8]), labels: (&str, &[u8])) -> Result<Self> {
        let part =
            Self { pixels: idx::images(images.0, images.1)?, labels: idx::labels(labels.0, labels.1)? };
        let count = part.pixels.len() / (SIDE * SIDE);
        if count != part.labels.len() {
            bail!("{}: {count} images, but {} holds {} labels", images.0, labels.0, part.labels.len());
        }
        Ok(part)
    }

    /// From candle-datasets' tensors: images `[n, 784]` on the scale 0 to 1 and labels `[n]` (u8).
    #[cfg(feature = "datasets")]
    fn from_tensors(images: &Tensor, labels: &Tensor) -> Result<Self> {
        // Adding a half before the cut to whole numbers rounds.
        let pixels = images.affine(255.0, 0.5)?.to_dtype(DType::U8)?.flatten_all()?.to_vec1()?;
        Ok(Self { pixels, labels: labels.to_dtype(DType::U8)?.to_vec1()? })
    }

    /// The number of examples.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The pixels at `places`, each byte replaced by its entry in `table`.
    fn gather<T: Copy + Send + Sync>(&self, places: &[usize], table: [T; 256]) -> Vec<T> {
        let size = SIDE * SIDE;
        let mut out = vec![table[0]; places.len() * size];
        out.par_chunks_exact_mut(size).zip(places).with_min_len(64).for_each(|(image, &i)| {
            let pixels = &self.pixels[i * size..(i + 1) * size];
            image.iter_mut().zip(pixels).for_each(|(v, &b)| *v = table[usize::from(b)]);
        });
        out
    }
}

/// The order of `count` examples in `epoch` (from 0): that of the files, or a random one that depends on (seed, epoch).
pub fn order(count: usize, shuffle: Option<u64>, epoch: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..count).collect();
    if let Some(seed) = shuffle {
        Stream::new(seed, "order", epoch).shuffle(&mut places);
    }
    places
}

/// The places for training and the held-out ones, the last sixth of a shuffle that is always the same.
pub fn split(count: usize) -> (Vec<usize>, Vec<usize>) {
    let mut train = order(count, None, 0);
    Stream::new(0, "split", 0).shuffle(&mut train);
    let held = train.split_off(count - count / 6);
    (train, held)
}

/// Name and contents of the file `stem-kind` or `stem.kind` (both spellings are in use) of `dir`, with or without `.gz`.
fn open(dir: &Path, stem: &str, kind: &str) -> Result<(String, Vec<u8>)> {
    for name in [format!("{stem}-{kind}"), format!("{stem}.{kind}")] {
        for path in [dir.join(&name), dir.join(format!("{name}.gz"))] {
            let shown = path.display().to_string();
            match std::fs::read(&path) {
                Ok(file) => return Ok((shown, file)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => bail!("{shown}: cannot be read ({e})"),
            }
        }
    }
    bail!("{}: neither {stem}-{kind} nor {stem}-{kind}.gz is in this folder", dir.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::idx::CLASSES;

    fn part(count: usize) -> Part {
        let pixels = (0..count * 784).map(|i| (i % 256) as u8).collect();
        Part { pixels, labels: (0..count).map(|i| (i % 10) as u8).collect() }
    }

    #[test]
    fn the_bundled_set_is_balanced() {
        let data = Data::bundled().unwrap();
        for (part, each) in [(&data.train, 600), (&data.test, 100)] {
            assert_eq!(part.pixels.len(), 10 * each * 784);
            for class in 0..CLASSES {
                assert_eq!(part.labels.iter().filter(|&&l| usize::from(l) == class).count(), each);
            }
        }
    }

    #[test]
    fn a_batch_is_normalized_and_in_the_order_asked_for() {
        let data = Data::new("t", part(4), part(1), Name::Mnist);
        for (dtype, tolerance) in
            [(DType::F64, 1e-15), (DType::F32, 1e-6), (DType::BF16, 0.02), (DType::F16, 0.002)]
        {
            let (x, y) = data.batch(&data.train, &[3, 1], dtype, &Device::Cpu).unwrap();
            assert_eq!((x.dims(), x.dtype()), (&[2, 1, 28, 28][..], dtype));
            assert_eq!(y.to_vec1::<u32>().unwrap(), [3, 1]);
            let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for (k, place) in [3, 1].into_iter().enumerate() {
                for j in 0..784 {
                    let byte = data.train.pixels[place * 784 + j];
                    let expected = (f64::from(byte) / 255.0 - 0.1307) / 0.3081;
                    assert!((x[k * 784 + j] - expected).abs() <= tolerance, "{dtype:?} {place} {j}");
                }
            }
        }
    }

    #[cfg(feature = "datasets")]
    #[test]
    fn tensors_give_the_bytes_back() {
        let original = part(1);
        let images = Tensor::from_vec(original.pixels.clone(), (1, 784), &Device::Cpu).unwrap();
        let images = (images.to_dtype(DType::F32).unwrap() / 255.0).unwrap();
        let labels = Tensor::from_vec(original.labels.clone(), 1, &Device::Cpu).unwrap();
        let part = Part::from_tensors(&images, &labels).unwrap();
        assert_eq!((part.pixels, part.labels), (original.pixels, original.labels));
    }

    #[test]
    fn the_order_depends_on_seed_and_epoch_alone() {
        assert_eq!(order(5, None, 3), [0, 1, 2, 3, 4]);
        let (a, b) = (order(100, Some(1), 0), order(100, Some(1), 1));
        assert_ne!(a, b);
        assert_ne!(a, order(100, Some(2), 0));
        assert_eq!(a, order(100, Some(1), 0));
        let mut sorted = b;
        sorted.sort_unstable();
        assert_eq!(sorted, order(100, None, 0));
    }

    #[test]
    fn the_split_is_fixed_and_has_every_place_once() {
        let (train, held) = split(60_000);
        assert_eq!((train.len(), held.len()), (50_000, 10_000));
        assert_eq!(split(60_000), (train.clone(), held.clone()));
        let mut all = [train, held].concat();
        all.sort_unstable();
        assert!(all.iter().enumerate().all(|(i, &place)| i == place));
    }

    #[test]
    fn a_folder_is_read_under_both_spellings_and_a_missing_file_is_named() {
        let dir = std::env::temp_dir().join(format!("kronwake-idx-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = |words: &[u32], body: &[u8]| {
            words.iter().flat_map(|w| w.to_be_bytes()).chain(body.iter().copied()).collect::<Vec<u8>>()
        };
        let images = file(&[2051, 2, 28, 28], &[7; 2 * 784]);
        std::fs::write(dir.join("train-images-idx3-ubyte"), &images).unwrap();
        std::fs::write(dir.join("train-labels.idx1-ubyte"), file(&[2049, 2], &[1, 2])).unwrap();
        std::fs::write(dir.join("t10k-images.idx3-ubyte.gz"), &images).unwrap();
        let error = |result: Result<Data>| sentence(&result.err().unwrap());
        let missing = error(Data::from_dir(&dir, Name::Mnist));
        assert!(
            missing
                .ends_with("neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz is in this folder")
        );
        std::fs::write(dir.join("t10k-labels-idx1-ubyte"), file(&[2049, 1], &[3])).unwrap();
        let counts = error(Data::from_dir(&dir, Name::Mnist));
        assert!(
            counts.contains("2 images, but") && counts.ends_with("t10k-labels-idx1-ubyte holds 1 labels"),
            "{counts}"
        );
        std::fs::write(dir.join("t10k-labels-idx1-ubyte"), file(&[2049, 2], &[3, 4])).unwrap();
        let data = Data::from_dir(&dir, Name::FashionMnist).unwrap();
        assert_eq!((data.train.len(), data.test.len(), data.moments), (2, 2, (0.2860, 0.3530)));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
