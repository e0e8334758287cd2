// Command app-a is the tutorial's App A.
package main

import "gantry.local/e2e/internal/webapp"

func main() { webapp.Run("app-a", "3000") }
