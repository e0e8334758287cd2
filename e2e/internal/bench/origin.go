package bench

// Origin says what was measured, and where. It is taken before anything is
// measured: who edits, commits or builds during the hour of a run must not change
// what its figures are said to be of.
type Origin struct {
	// Commit is that of the repository; "-dirty" follows if there were changes.
	Commit string `json:"commit"`
	// Program is the beginning of the SHA-256 of the agent's binary; empty without a Gantry node.
	Program string `json:"program"`
	// Peer names the programs of the stock node with their versions.
	Peer    string  `json:"peer,omitempty"`
	Machine Machine `json:"machine"`
}

// NewOrigin describes this machine and the agent's binary as they are now. The
// path is empty if no Gantry node is measured.
func NewOrigin(commit, peer, binary string) (Origin, error) {
	o := Origin{Commit: commit, Peer: peer, Machine: thisMachine()}
	if binary == "" {
		return o, nil
	}
	var err error
	o.Program, err = digest(binary)
	return o, err
}
