//! kubelet flags and `KubeletConfiguration` become one validated `Config`.
