//! What an image is made of: index, manifest and configuration as JSON, of OCI and of Docker.
//!
//! # Source
//! OCI image-spec, image-layout.md, image-index.md, manifest.md, config.md; `docker save`.

use serde::Deserialize;
use serde_json::{Value, json};

use super::bundle::Bundle;
use super::compress::{Packed, Packing};
use super::digest::Digest;
use crate::error::{Error, Result};

/// Largest JSON file that is read, in bytes; registries allow 4 MiB for a manifest.
const JSON_MAX: u64 = 16 << 20;
/// Indexes within indexes.
const NESTING_MAX: usize = 4;
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An image in a bundle.
#[derive(Clone, Debug)]
pub struct Image {
    /// The configuration as it stands there.
    pub config: Vec<u8>,
    /// Its names, with tags.
    pub names: Vec<String>,
    /// The layers, the lowest first.
    pub layers: Vec<Layer>,
}

/// A layer of an image in a bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Path in the bundle.
    pub path: String,
    /// Digest and size of the file there, if told.
    pub blob: Option<(Digest, u64)>,
    /// Digest of the archive once unpacked.
    pub diff: Digest,
}

impl Image {
    /// Returns the image's id, the digest of its configuration.
    pub fn id(&self) -> Digest {
        Digest::of(&self.config)
    }

    /// Returns what names each layer together with those beneath it.
    ///
    /// # Source
    /// OCI image-spec config.md, "Layer ChainID".
    pub fn chain(&self) -> Vec<Digest> {
        let mut chain: Vec<Digest> = Vec::new();
        for layer in &self.layers {
            let next = match chain.last() {
                Some(below) => Digest::of(format!("{below} {}", layer.diff).as_bytes()),
                None => layer.diff,
            };
            chain.push(next);
        }
        chain
    }
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize, Clone)]
struct Descriptor {
    #[serde(default, rename = "mediaType")]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Deserialize, Clone)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct DockerManifest {
    #[serde(rename = "Config")]
    config: String,
    #[serde(default, rename = "RepoTags")]
    names: Option<Vec<String>>,
    #[serde(default, rename = "Layers")]
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// Reads which images a bundle holds.
///
/// # Errors
/// `EIO` for a bundle that is incomplete, malformed or does not have the digests it says.
pub fn images(bundle: &Bundle) -> Result<Vec<Image>> {
    if let Some(index) = bundle.read("index.json", JSON_MAX)? {
        let index: Index = parse("index.json", &index)?;
        let mut images = Vec::new();
        for descriptor in index.manifests {
            images.extend(oci_image(bundle, &descriptor, NESTING_MAX)?);
        }
        return Ok(images);
    }
    let Some(manifest) = bundle.read("manifest.json", JSON_MAX)? else {
        return Err(corrupt(
            "the image",
            "has neither index.json (OCI) nor manifest.json (docker save)",
        ));
    };
    let manifests: Vec<DockerManifest> = parse("manifest.json", &manifest)?;
    manifests.into_iter().map(|manifest| docker_image(bundle, manifest)).collect()
}

fn oci_image(bundle: &Bundle, descriptor: &Descriptor, nesting: usize) -> Result<Option<Image>> {
    let bytes = blob(bundle, descriptor)?;
    let value: Value = parse(&descriptor.digest, &bytes)?;
    if value.get("manifests").is_some() {
        let nesting = nesting
            .checked_sub(1)
            .ok_or_else(|| corrupt(&descriptor.digest, "is an index within too many others"))?;
        let index: Index = parse(&descriptor.digest, &bytes)?;
        let Some(inner) = index.manifests.iter().find(|inner| is_for_here(inner)) else {
            return Err(corrupt(&descriptor.digest, "has no image for this machine"));
        };
        let named = Descriptor { annotations: descriptor.annotations.clone(), ..inner.clone() };
        return oci_image(bundle, &named, nesting);
    }
    // Signatures, build records and the like lie beside images.
    if value.get("layers").is_none() || value.get("config").is_none() {
        return Ok(None);
    }
    let manifest: Manifest = parse(&descriptor.digest, &bytes)?;
    let config = blob(bundle, &manifest.config)?;
    let diffs = diff_ids(&config)?;
    if diffs.len() != manifest.layers.len() {
        return Err(corrupt(&descriptor.digest, "has more or fewer layers than its configuration"));
    }
    let mut layers = Vec::new();
    for (layer, diff) in manifest.layers.iter().zip(diffs) {
        let digest = Digest::parse(&layer.digest)?;
        layers.push(Layer { path: blob_path(&digest), blob: Some((digest, layer.size)), diff });
    }
    let names = descriptor.annotations.get(REF_NAME).cloned().into_iter().collect();
    Ok(Some(Image { config, names, layers }))
}

fn is_for_here(descriptor: &Descriptor) -> bool {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let is_image = !descriptor.media_type.contains("attestation");
    is_image
        && descriptor
            .platform
            .as_ref()
            .is_none_or(|platform| platform.architecture == architecture && platform.os == "linux")
}

fn docker_image(bundle: &Bundle, manifest: DockerManifest) -> Result<Image> {
    let config = bundle
        .read(&manifest.config, JSON_MAX)?
        .ok_or_else(|| corrupt(&manifest.config, "is missing"))?;
    let diffs = diff_ids(&config)?;
    if diffs.len() != manifest.layers.len() {
        return Err(corrupt("manifest.json", "has more or fewer layers than its configuration"));
    }
    let layers = manifest.layers.into_iter().zip(diffs);
    let layers = layers.map(|(path, diff)| Layer { path, blob: None, diff }).collect();
    Ok(Image { config, names: manifest.names.unwrap_or_default(), layers })
}

fn diff_ids(config: &[u8]) -> Result<Vec<Digest>> {
    let config: Config = parse("the configuration", config)?;
    config.rootfs.diff_ids.iter().map(|digest| Digest::parse(digest)).collect()
}

fn blob(bundle: &Bundle, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let digest = Digest::parse(&descriptor.digest)?;
    let bytes = bundle
        .read(&blob_path(&digest), JSON_MAX)?
        .ok_or_else(|| corrupt(&descriptor.digest, "is missing"))?;
    if Digest::of(&bytes) != digest || bytes.len() as u64 != descriptor.size {
        return Err(corrupt(&descriptor.digest, "has other content than its digest says"));
    }
    Ok(bytes)
}

/// Returns where an OCI layout has the blob of a digest.
pub fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn parse<'a, T: Deserialize<'a>>(name: &str, bytes: &'a [u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| corrupt(name, format!("is not as expected: {error}")))
}

fn corrupt(name: &str, what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::Corrupt { what: what.into(), at: super::read::show(name.as_bytes()).into() }
}

/// Returns a configuration with other layers.
///
/// # Errors
/// `EIO` if it is no JSON object.
pub fn with_layers(config: &[u8], diffs: &[Digest]) -> Result<Vec<u8>> {
    let mut config: Value = parse("the configuration", config)?;
    let object =
        config.as_object_mut().ok_or_else(|| corrupt("the configuration", "is no object"))?;
    let diffs: Vec<String> = diffs.iter().map(Digest::to_string).collect();
    object.insert("rootfs".to_owned(), json!({ "type": "layers", "diff_ids": diffs }));
    Ok(config.to_string().into_bytes())
}

/// Returns the manifest of an image whose layers were all packed in one way.
pub fn oci_manifest(config: &[u8], layers: &[Packed], packing: Packing) -> Vec<u8> {
    let media_type = match packing {
        Packing::Plain => "application/vnd.oci.image.layer.v1.tar",
        Packing::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
        Packing::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
    };
    let layers: Vec<Value> =
        layers.iter().map(|layer| descriptor(media_type, &layer.blob, layer.size)).collect();
    let config = descriptor(
        "application/vnd.oci.image.config.v1+json",
        &Digest::of(config),
        config.len() as u64,
    );
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": layers,
    })
    .to_string()
    .into_bytes()
}

/// Returns the index of a layout with one image.
pub fn oci_index(manifest: &[u8], name: Option<&str>) -> Vec<u8> {
    let mut entry = descriptor(
        "application/vnd.oci.image.manifest.v1+json",
        &Digest::of(manifest),
        manifest.len() as u64,
    );
    if let (Some(name), Some(object)) = (name, entry.as_object_mut()) {
        object.insert("annotations".to_owned(), json!({ REF_NAME: name }));
    }
    json!({ "schemaVersion": 2, "manifests": [entry] }).to_string().into_bytes()
}

/// Returns `manifest.json` of a `docker save` archive with one image.
pub fn docker_manifest(config: &Digest, names: &[String], layers: &[Packed]) -> Vec<u8> {
    let layers: Vec<String> =
        layers.iter().map(|layer| format!("{}.tar", layer.blob.hex())).collect();
    json!([{ "Config": format!("{}.json", config.hex()), "RepoTags": names, "Layers": layers }])
        .to_string()
        .into_bytes()
}

fn descriptor(media_type: &str, digest: &Digest, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest.to_string(), "size": size })
}
