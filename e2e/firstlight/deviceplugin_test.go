package firstlight

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// A device plugin that runs in the test's process, made of Kubernetes' own API.
type devicePlugin struct {
	pluginapi.UnimplementedDevicePluginServer
	registerapi.UnimplementedRegistrationServer

	t        testing.TB
	resource string
	socket   string
	// Handed to every container, at /grant.
	shared string
	// Of the Allocate calls to come; none is an error.
	cdi  string
	kind string

	mu        sync.Mutex
	devices   map[string]string // ID to health
	changed   chan struct{}
	server    *grpc.Server
	prepared  []string
	allocated []string
	failure   error
	notified  chan *registerapi.RegistrationStatus
}

func newDevicePlugin(t testing.TB, resource, socket string, devices map[string]string) *devicePlugin {
	p := &devicePlugin{
		t: t, resource: resource, socket: socket, shared: t.TempDir(), kind: registerapi.DevicePlugin,
		devices: devices, changed: make(chan struct{}), notified: make(chan *registerapi.RegistrationStatus, 8),
	}
	if err := os.WriteFile(filepath.Join(p.shared, "file"), []byte("granted"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.stop)
	return p
}

// serve listens on the plugin's socket.
func (p *devicePlugin) serve() {
	p.t.Helper()
	_ = os.Remove(p.socket)
	listener, err := net.Listen("unix", p.socket)
	if err != nil {
		p.t.Fatal(err)
	}
	p.server = grpc.NewServer()
	pluginapi.RegisterDevicePluginServer(p.server, p)
	registerapi.RegisterRegistrationServer(p.server, p)
	go func(server *grpc.Server) { _ = server.Serve(listener) }(p.server)
}

func (p *devicePlugin) stop() {
	if p.server != nil {
		p.server.Stop()
		p.server = nil
	}
}

// register announces a resource to the node on its socket.
func (p *devicePlugin) register(version, resource string) error {
	dir := filepath.Dir(p.socket)
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "kubelet.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err = pluginapi.NewRegistrationClient(conn).Register(ctx, &pluginapi.RegisterRequest{
		Version: version, Endpoint: filepath.Base(p.socket), ResourceName: resource,
	}, grpc.WaitForReady(true))
	return err
}

// join serves and registers.
func (p *devicePlugin) join() {
	p.t.Helper()
	p.serve()
	if err := p.register(pluginapi.Version, p.resource); err != nil {
		p.t.Fatalf("register: %v", err)
	}
}

// set changes a device's health.
func (p *devicePlugin) set(id, health string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.devices[id] = health
	close(p.changed)
	p.changed = make(chan struct{})
}

// fail lets Allocate fail until it is given nil.
func (p *devicePlugin) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failure = err
}

// calls are the devices of the Allocate and PreStartContainer calls so far.
func (p *devicePlugin) calls() (allocated, prepared []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.allocated), slices.Clone(p.prepared)
}

func (p *devicePlugin) GetDevicePluginOptions(context.Context, *pluginapi.Empty) (*pluginapi.DevicePluginOptions, error) {
	return &pluginapi.DevicePluginOptions{PreStartRequired: true, GetPreferredAllocationAvailable: true}, nil
}

func (p *devicePlugin) ListAndWatch(_ *pluginapi.Empty, stream pluginapi.DevicePlugin_ListAndWatchServer) error {
	for {
		p.mu.Lock()
		changed := p.changed
		list := &pluginapi.ListAndWatchResponse{}
		for id, health := range p.devices {
			list.Devices = append(list.Devices, &pluginapi.Device{ID: id, Health: health})
		}
		p.mu.Unlock()
		if err := stream.Send(list); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

// GetPreferredAllocation wants the last ones.
func (p *devicePlugin) GetPreferredAllocation(_ context.Context, request *pluginapi.PreferredAllocationRequest) (*pluginapi.PreferredAllocationResponse, error) {
	response := &pluginapi.PreferredAllocationResponse{}
	for _, container := range request.ContainerRequests {
		ids := slices.Sorted(slices.Values(container.AvailableDeviceIDs))
		slices.Reverse(ids)
		response.ContainerResponses = append(response.ContainerResponses,
			&pluginapi.ContainerPreferredAllocationResponse{DeviceIDs: ids[:container.AllocationSize]})
	}
	return response, nil
}

func (p *devicePlugin) Allocate(_ context.Context, request *pluginapi.AllocateRequest) (*pluginapi.AllocateResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failure != nil {
		return nil, p.failure
	}
	response := &pluginapi.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		ids := slices.Sorted(slices.Values(container.DevicesIds))
		p.allocated = append(p.allocated, strings.Join(ids, ","))
		answer := &pluginapi.ContainerAllocateResponse{
			Envs:   map[string]string{"GRANTED": strings.Join(ids, ","), "OWN": "the plugin's"},
			Mounts: []*pluginapi.Mount{{ContainerPath: "/grant", HostPath: p.shared, ReadOnly: true}},
		}
		for _, id := range ids {
			answer.Devices = append(answer.Devices, &pluginapi.DeviceSpec{ContainerPath: "/dev/granted/" + id, HostPath: "/dev/full", Permissions: "rw"})
		}
		if p.cdi != "" {
			answer.CdiDevices = append(answer.CdiDevices, &pluginapi.CDIDevice{Name: p.cdi})
		}
		response.ContainerResponses = append(response.ContainerResponses, answer)
	}
	return response, nil
}

func (p *devicePlugin) PreStartContainer(_ context.Context, request *pluginapi.PreStartContainerRequest) (*pluginapi.PreStartContainerResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.prepared = append(p.prepared, strings.Join(slices.Sorted(slices.Values(request.DevicesIds)), ","))
	return &pluginapi.PreStartContainerResponse{}, nil
}

func (p *devicePlugin) GetInfo(context.Context, *registerapi.InfoRequest) (*registerapi.PluginInfo, error) {
	return &registerapi.PluginInfo{Type: p.kind, Name: p.resource, SupportedVersions: []string{pluginapi.Version}}, nil
}

func (p *devicePlugin) NotifyRegistrationStatus(_ context.Context, status *registerapi.RegistrationStatus) (*registerapi.RegistrationStatusResponse, error) {
	p.notified <- status
	return &registerapi.RegistrationStatusResponse{}, nil
}

// awaitNotice is what the node says of the plugin that it found.
func (p *devicePlugin) awaitNotice() *registerapi.RegistrationStatus {
	p.t.Helper()
	select {
	case status := <-p.notified:
		return status
	case <-time.After(20 * time.Second):
		p.t.Fatal(errors.New("the node does not notice the plugin's socket"))
		return nil
	}
}
