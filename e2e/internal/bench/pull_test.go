package bench

import (
	"testing"
	"time"
)

func TestPullTime(t *testing.T) {
	took, err := pullTime(`Successfully pulled image "r:5000/many:1" in 1.062s (1.31s including waiting). Image size: 212000000 bytes.`)
	if err != nil || took != 1310*time.Millisecond {
		t.Errorf("%v, %v", took, err)
	}
	for _, message := range []string{"", "Container image \"x\" already present on machine", "in 1s (soon including waiting)"} {
		if took, err := pullTime(message); err == nil {
			t.Errorf("%q: %v", message, took)
		}
	}
}
