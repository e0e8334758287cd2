package firstlight

import (
	"slices"
	"sync"
	"testing"
)

// The tests run at the same time, and may share nodes as long as they only run
// Pods there. One that stops an agent, drains a node or counts what is on it
// has the node for itself.
var claims = struct {
	sync.Mutex
	nodes map[string]*sync.RWMutex
}{nodes: map[string]*sync.RWMutex{}}

func claim(node string) *sync.RWMutex {
	claims.Lock()
	defer claims.Unlock()
	if claims.nodes[node] == nil {
		claims.nodes[node] = &sync.RWMutex{}
	}
	return claims.nodes[node]
}

// share uses nodes beside other tests, until the test's end.
func share(t *testing.T, nodes ...string) {
	// In one order everywhere: two tests never wait for each other.
	slices.Sort(nodes)
	for _, node := range slices.Compact(nodes) {
		lock := claim(node)
		lock.RLock()
		t.Cleanup(lock.RUnlock)
	}
}

// own uses a node alone, until the test's end.
func own(t *testing.T, node string) {
	lock := claim(node)
	lock.Lock()
	t.Cleanup(lock.Unlock)
}
