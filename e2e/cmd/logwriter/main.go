// Command logwriter writes lines to its standard output, each by a write of its
// own, as a program does that logs much; then it says how many seconds that
// took as its container's termination message.
//
//	logwriter BYTES [LINE-LENGTH]
package main

import (
	"bytes"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 2 {
		log.Fatal("usage: logwriter BYTES [LINE-LENGTH]")
	}
	total, length := number(os.Args[1]), 100
	if len(os.Args) > 2 {
		length = number(os.Args[2])
	}
	line := append(bytes.Repeat([]byte("gantry "), length/7+1)[:length-1], '\n')
	began := time.Now()
	for written := 0; written < total; written += length {
		if _, err := os.Stdout.Write(line); err != nil {
			log.Fatal(err)
		}
	}
	seconds := fmt.Sprintf("%.6f", time.Since(began).Seconds())
	if err := os.WriteFile("/dev/termination-log", []byte(seconds), 0o644); err != nil {
		log.Fatal(err)
	}
}

func number(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		log.Fatalf("logwriter: %q is no positive number", text)
	}
	return n
}
