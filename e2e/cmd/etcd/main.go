// Command etcd is the etcd server of the version that the API server's own
// module requires, so that both always come from the same tested pair.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
