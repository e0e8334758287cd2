package bench

import (
	"context"
	"time"
)

func (b *Bench) churn() Scenario {
	const alive = 20
	count := b.Churn
	if b.Quick {
		count = min(count, 100)
	}
	return Scenario{
		Name: "churn", What: "many Pods come and go, 20 at a time; what grows meanwhile?",
		Metrics: []Metric{
			{Name: "churn/pod", Title: "churn, time per Pod", Unit: "ms"},
			{Name: "churn/cpu", Title: "churn, node CPU per Pod", Unit: "ms"},
			{Name: "churn/private", Title: "churn, private memory that is left", Unit: "MiB"},
			{Name: "churn/files", Title: "churn, open files that are left", Unit: ""},
			{Name: "churn/threads", Title: "churn, threads that are left", Unit: ""},
		},
		Rounds: 1, QuickRounds: 1,
		Turn: func(ctx context.Context, s *Stack, r *Recorder) error {
			// The first tenth lets caches and pools grow to what they need.
			if err := s.churn(ctx, max(count/10, alive), alive); err != nil {
				return err
			}
			if err := s.settle(ctx); err != nil {
				return err
			}
			before, err := s.holdings()
			if err != nil {
				return err
			}
			began := time.Now()
			cpu, err := s.costOf(ctx, func() error { return s.churn(ctx, count, alive) })
			if err != nil {
				return err
			}
			r.add("pod", ms(time.Since(began))/float64(count))
			r.add("cpu", ms(cpu)/float64(count))
			if err := s.settle(ctx); err != nil {
				return err
			}
			after, err := s.holdings()
			if err != nil {
				return err
			}
			r.add("private", after.Private-before.Private)
			r.add("files", float64(after.Files-before.Files))
			r.add("threads", float64(after.Threads-before.Threads))
			r.note("before", before)
			r.note("after", after)
			return nil
		},
	}
}

// churn lets so many Pods come and go, some of them alive at a time.
func (s *Stack) churn(ctx context.Context, count, alive int) error {
	queue, failures := make(chan string), make(chan error, alive)
	for range alive {
		go func() {
			var failure error
			for name := range queue {
				if failure != nil {
					continue
				}
				if _, failure = s.start(ctx, s.pod(name)); failure == nil {
					_, failure = s.stop(ctx, name)
				}
			}
			failures <- failure
		}()
	}
	for _, name := range s.names("churn", count) {
		queue <- name
	}
	close(queue)
	var first error
	for range alive {
		if err := <-failures; err != nil && first == nil {
			first = err
		}
	}
	return first
}
