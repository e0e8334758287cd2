# The node as an image: on nothing, one static file, certificate authorities, and the list of what the file is made of.
#
#   docker build -t registry.example/gantry:0.1.0 .
#   docker buildx build --platform linux/amd64,linux/arm64 --push -t registry.example/gantry:0.1.0 .
#   hack/image                            # without a Docker engine; this is what CI does
#
# Runs as `gantry agent` and needs --privileged (charts/gantry does all of it).
# The builder is always one for the building machine, and compiles for the other: nothing is emulated.
# BASE is a Debian with Rust in it, or a mirror's name for this one. PROFILE is one of cargo's.
ARG BASE=docker.io/library/rust:1-bookworm

FROM --platform=$BUILDPLATFORM ${BASE} AS build
ENV DEBIAN_FRONTEND=noninteractive
ARG BUILDARCH
ARG TARGETARCH
RUN case $TARGETARCH in \
      amd64) target=x86_64-unknown-linux-gnu compiler=gcc-x86-64-linux-gnu prefix=x86_64-linux-gnu ;; \
      arm64) target=aarch64-unknown-linux-gnu compiler=gcc-aarch64-linux-gnu prefix=aarch64-linux-gnu ;; \
      *) echo "Gantry is not for $TARGETARCH" >&2; exit 1 ;; \
    esac \
 && if [ "$TARGETARCH" = "$BUILDARCH" ]; then compiler=gcc; else dpkg --add-architecture "$TARGETARCH"; fi \
 && apt-get update \
 && apt-get install --yes --no-install-recommends $compiler gcc libc6-dev lld make pkg-config ca-certificates jq \
      libelf-dev:$TARGETARCH zlib1g-dev:$TARGETARCH libseccomp-dev:$TARGETARCH \
 && rm -rf /var/lib/apt/lists/* \
 && if [ ! -d "$(rustc --print sysroot)/lib/rustlib/$target" ]; then rustup target add $target; fi \
 && if ! command -v cargo-cyclonedx >/dev/null; then cargo install --locked --root /usr/local cargo-cyclonedx; fi \
 && if [ "$TARGETARCH" != "$BUILDARCH" ]; then ln -s ld.lld /usr/bin/$prefix-ld.lld; fi \
 && echo $target >/target
WORKDIR /src
COPY Cargo.toml Cargo.lock LICENSE ./
COPY .cargo .cargo
COPY src src
# The tests are targets of the manifest, so their sources have to be there.
COPY tests tests
COPY hack/sbom hack/release.toml hack/
ARG PROFILE=release
RUN --mount=type=cache,id=gantry-target,target=/src/target \
    target=$(cat /target) \
 && if [ "$BUILDARCH" != amd64 ]; then export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER=x86_64-linux-gnu-gcc; fi \
 && if [ $PROFILE = release ]; then config='--config hack/release.toml'; fi \
 && cargo build --locked --profile $PROFILE --target $target --bin gantry ${config:-} \
 && install -D -m 755 target/$target/$(echo $PROFILE | sed 's/^dev$/debug/')/gantry /image/usr/bin/gantry \
 && hack/sbom /image/usr/share/sbom/gantry.cdx.json $target \
 && install -D -m 644 LICENSE /image/usr/share/doc/gantry/LICENSE \
 && install -D -m 644 /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ca-certificates.crt \
 && mkdir -p /image/run /image/tmp /image/var/lib /image/var/log

FROM scratch
COPY --from=build /image/ /
ENTRYPOINT ["/usr/bin/gantry"]
CMD ["agent"]
