# The node as an image: one static file and certificate authorities, on nothing.
#
#   docker build -t registry.example/gantry:0.1.0 .
#
# Runs as `gantry agent` and needs --privileged (charts/gantry does all of it).
# x86_64 only, as the program itself; BASE may be a mirror's name.
ARG BASE=docker.io/library/rust:1-bookworm

FROM ${BASE} AS build
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc lld pkg-config libc6-dev libelf-dev zlib1g-dev libseccomp-dev ca-certificates \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock rustfmt.toml clippy.toml ./
COPY .cargo .cargo
COPY src src
# The tests are targets of the manifest, so their sources have to be there.
COPY tests tests
RUN cargo build --release --locked --bin gantry \
 && install -D -m 755 target/x86_64-unknown-linux-gnu/release/gantry /image/usr/bin/gantry \
 && install -D -m 644 /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ca-certificates.crt \
 && mkdir -p /image/run /image/tmp /image/var/lib /image/var/log

FROM scratch
COPY --from=build /image/ /
ENTRYPOINT ["/usr/bin/gantry"]
CMD ["agent"]
