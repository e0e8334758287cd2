// Command logwriter writes lines to its standard output, each by a write of its
// own, as a program does that logs much; then it says how many seconds that
// took, and how many of CPU it used, as its container's termination message.
//
// With --alone the lines go into a pipe of its own, which it empties from time to
// time without counting that: less than these writes no node can make them cost.
//
//	logwriter [--alone] BYTES [LINE-LENGTH]
package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"syscall"
	"time"
)

// pipeSize is the largest pipe that every user may have. A page of it takes as
// many lines as fit into it as a whole.
const pipeSize, pageSize = 1 << 20, 4096

func main() {
	log.SetFlags(0)
	alone := flag.Bool("alone", false, "write into an empty pipe")
	flag.Parse()
	if flag.NArg() < 1 {
		log.Fatal("usage: logwriter [--alone] BYTES [LINE-LENGTH]")
	}
	total, length := number(flag.Arg(0)), 100
	if flag.NArg() > 1 {
		length = number(flag.Arg(1))
	}
	line := append(bytes.Repeat([]byte("gantry "), length/7+1)[:length-1], '\n')
	var spent cost
	if *alone {
		spent = writeAlone(line, total)
	} else {
		spent = write(os.Stdout, line, total)
	}
	seconds := fmt.Sprintf("%.6f %.6f", spent.time.Seconds(), spent.cpu.Seconds())
	if err := os.WriteFile("/dev/termination-log", []byte(seconds), 0o644); err != nil {
		log.Fatal(err)
	}
}

type cost struct{ time, cpu time.Duration }

// write writes the line until there are so many bytes.
func write(out *os.File, line []byte, total int) cost {
	began, used := time.Now(), usedCPU()
	for written := 0; written < total; written += len(line) {
		if _, err := out.Write(line); err != nil {
			log.Fatal(err)
		}
	}
	return cost{time.Since(began), usedCPU() - used}
}

// writeAlone does the same into a pipe that is empty again and again.
func writeAlone(line []byte, total int) cost {
	reader, writer, err := os.Pipe()
	if err != nil {
		log.Fatal(err)
	}
	// Fd also makes the end a blocking one, as standard output is.
	if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, writer.Fd(), syscall.F_SETPIPE_SZ, pipeSize); errno != 0 {
		log.Fatalf("resize the pipe: %v", errno)
	}
	most := pipeSize / pageSize * (pageSize / len(line)) * len(line)
	if most == 0 {
		log.Fatal("logwriter: --alone takes lines of up to a page")
	}
	buffer := make([]byte, most)
	var spent cost
	for total > 0 {
		bytes := min(total+len(line)-1, most) / len(line) * len(line)
		once := write(writer, line, bytes)
		if _, err := io.ReadFull(reader, buffer[:bytes]); err != nil {
			log.Fatal(err)
		}
		spent.time += once.time
		spent.cpu += once.cpu
		total -= bytes
	}
	return spent
}

func usedCPU() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		log.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func number(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		log.Fatalf("logwriter: %q is no positive number", text)
	}
	return n
}
