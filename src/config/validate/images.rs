//! Image collection, pulls, and who may use a pulled image.

use super::{Errors, one_of};
use crate::config::duration::Duration;
use crate::config::gates::FeatureGates;
use crate::config::kubelet::KubeletConfiguration;

pub(super) fn images(config: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Errors) {
    let (high, low) = (config.image_gc_high_threshold_percent, config.image_gc_low_threshold_percent);
    errors.range("imageGCHighThresholdPercent (--image-gc-high-threshold)", high, 0..=100);
    errors.range("imageGCLowThresholdPercent (--image-gc-low-threshold)", low, 0..=100);
    errors.when(
        low >= high,
        format!(
            "imageGCLowThresholdPercent (--image-gc-low-threshold) {low} must be less than imageGCHighThresholdPercent \
             (--image-gc-high-threshold) {high}"
        ),
    );
    let (least, most) = (config.image_minimum_gc_age, config.image_maximum_gc_age);
    errors.when(
        !most.is_zero() && !gates.enabled("ImageMaximumGCAge"),
        "ImageMaximumGCAge feature gate is required for Kubelet configuration option imageMaximumGCAge",
    );
    errors.when(least < Duration::ZERO, format!("imageMinimumGCAge {least} must not be negative"));
    errors.when(most < Duration::ZERO, format!("imageMaximumGCAge {most} must not be negative"));
    errors.when(
        most > Duration::ZERO && most <= least,
        format!("imageMaximumGCAge {most} must be greater than imageMinimumGCAge {least}"),
    );
    if let Some(pulls) = config.max_parallel_image_pulls {
        errors.when(pulls < 1, format!("maxParallelImagePulls {pulls} must be a positive number"));
        errors.when(
            config.serialize_image_pulls && pulls > 1,
            "maxParallelImagePulls cannot be larger than 1 unless SerializeImagePulls (--serialize-image-pulls) is set \
             to false",
        );
    }
    let policy = config.image_pull_credentials_verification_policy.as_str();
    let allowlist = &config.preloaded_images_verification_allowlist;
    if !gates.enabled("KubeletEnsureSecretPulledImages") {
        const NEEDED: &str = "must not be set if KubeletEnsureSecretPulledImages feature gate is not enabled";
        errors.when(!policy.is_empty(), format!("`imagePullCredentialsVerificationPolicy` {NEEDED}"));
        errors.when(!allowlist.is_empty(), format!("`preloadedImagesVerificationAllowlist` {NEEDED}"));
        return;
    }
    one_of(
        errors,
        "imagePullCredentialsVerificationPolicy",
        policy,
        &["NeverVerify", "NeverVerifyPreloadedImages", "NeverVerifyAllowlistedImages", "AlwaysVerify"],
    );
    errors.when(
        !allowlist.is_empty() && policy != "NeverVerifyAllowlistedImages",
        "can't set `preloadedImagesVerificationAllowlist` if `imagePullCredentialsVertificationPolicy` is not \
         \"NeverVerifyAllowlistedImages\"",
    );
    for pattern in allowlist {
        // a registry and repository, with /* for everything below; neither tag nor digest
        let path = pattern.strip_suffix("/*").unwrap_or(pattern);
        let last = path.rsplit('/').next().unwrap_or("");
        let wrong = path.is_empty() || path.contains(['*', '@', ' ']) || (path.contains('/') && last.contains(':'));
        errors.when(
            wrong,
            format!("invalid image pattern in `preloadedImagesVerificationAllowlist`: {pattern:?}: write host/repository or host/path/*"),
        );
    }
}
