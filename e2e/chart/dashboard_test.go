package chart

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gantry.local/e2e/internal/kit"
)

// The dashboard is there when it is wanted, and asks for nothing that a node does not tell.
func TestDashboard(t *testing.T) {
	if without := names(template(t)["ConfigMap"]); len(without) != 1 {
		t.Errorf("ConfigMaps without dashboard.enabled: %v", without)
	}
	objects := template(t, "--set=dashboard.enabled=true", "--set=dashboard.annotations.folder=Nodes")
	index := slices.Index(names(objects["ConfigMap"]), "edge-gantry-dashboard")
	if index < 0 {
		t.Fatalf("ConfigMaps: %v", names(objects["ConfigMap"]))
	}
	object := objects["ConfigMap"][index]
	if object.GetLabels()["grafana_dashboard"] != "1" || object.GetAnnotations()["folder"] != "Nodes" {
		t.Errorf("labels %v, annotations %v", object.GetLabels(), object.GetAnnotations())
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	data, _ := object.Object["data"].(map[string]any)
	text, _ := data["gantry-nodes.json"].(string)
	if err := json.Unmarshal([]byte(text), &dashboard); err != nil || len(dashboard.Panels) < 6 {
		t.Fatalf("%d panels: %v", len(dashboard.Panels), err)
	}

	e := kit.New(t)
	node := e.Nodes()[0]
	var told string
	for _, path := range []string{"/metrics", "/metrics/resource"} {
		out, errOut, err := e.Kubectl(e.Ctx, "get", "--raw", "/api/v1/nodes/"+node+"/proxy"+path)
		if err != nil {
			t.Fatalf("%s: %v %s", path, err, errOut)
		}
		told += out
	}
	metric := regexp.MustCompile(`([a-z]+(?:_[a-z]+)+)\{`)
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			found := metric.FindAllStringSubmatch(target.Expr, -1)
			if len(found) == 0 {
				t.Errorf("%s: no metric in %s", panel.Title, target.Expr)
			}
			for _, match := range found {
				if name := strings.TrimSuffix(match[1], "_bucket"); !strings.Contains(told, "# TYPE "+name+" ") {
					t.Errorf("%s: the node does not tell %s", panel.Title, name)
				}
			}
		}
	}
}
