// Command app-b is the tutorial's App B.
package main

import "gantry.local/e2e/internal/webapp"

func main() { webapp.Run("app-b", "4000") }
