// Package webapp is the HTTP server that the tutorial's two applications are.
package webapp

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// Run serves until SIGTERM or SIGINT. The port is the default, $PORT or --port.
func Run(name, defaultPort string) {
	log.SetFlags(log.LstdFlags | log.LUTC)
	log.SetPrefix(name + ": ")
	port := flag.String("port", or(os.Getenv("PORT"), defaultPort), "port to listen on (also $PORT)")
	flag.Parse()

	hostname, err := os.Hostname()
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", ":"+*port)
	if errors.Is(err, syscall.EADDRINUSE) {
		log.Fatalf("port %s is already taken: another container of this Pod listens on it (containers of a Pod share one network); set PORT to a free one", *port)
	} else if err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "%s on %s\n", name, hostname)
	})
	mux.HandleFunc("GET /peer", peer)
	server := &http.Server{Handler: logged(mux), ReadHeaderTimeout: 10 * time.Second}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	go func() {
		<-ctx.Done()
		log.Print("ending")
		deadline, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		server.Shutdown(deadline)
	}()
	log.Printf("listening on port %s", *port)
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
}

// peer fetches ?url= and passes the answer on, to show who reaches whom.
func peer(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL.Query().Get("url"), nil)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer answer.Body.Close()
	w.WriteHeader(answer.StatusCode)
	io.Copy(w, io.LimitReader(answer.Body, 1<<20))
}

func logged(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		log.Printf("%s %s from %s", r.Method, r.URL.RequestURI(), r.RemoteAddr)
		next.ServeHTTP(w, r)
	})
}

func or(value, fallback string) string {
	if value != "" {
		return value
	}
	return fallback
}
