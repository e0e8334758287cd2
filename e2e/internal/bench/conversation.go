package bench

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"time"
)

// question is a stream of commands, as a program's standard input.
type question struct {
	reader *io.PipeReader
	writer *io.PipeWriter
}

// answers is the program's standard output.
type answers struct {
	lines chan struct{}
	ended chan error
}

func newConversation() (*question, *answers) {
	reader, writer := io.Pipe()
	return &question{reader, writer}, &answers{lines: make(chan struct{}, 1024), ended: make(chan error, 1)}
}

// Read implements io.Reader for the other side.
func (q *question) Read(p []byte) (int, error) { return q.reader.Read(p) }

// say does not wait for the other side: if that has ended, the answer tells.
func (q *question) say(text string) {
	go q.writer.Write([]byte(text))
}

func (q *question) hangUp() { q.writer.Close() }

// Write implements io.Writer for the other side.
func (a *answers) Write(p []byte) (int, error) {
	for range bytes.Count(p, []byte("\n")) {
		a.lines <- struct{}{}
	}
	return len(p), nil
}

func (a *answers) end(err error) { a.ended <- err }

// line waits for one line.
func (a *answers) line(ctx context.Context) error {
	select {
	case <-a.lines:
		return nil
	case err := <-a.ended:
		return fmt.Errorf("the shell has ended: %w", err)
	case <-time.After(time.Minute):
		return fmt.Errorf("no answer within a minute")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
