// What helm does with a chart (pkg/engine/engine.go), for tests: Go templates with sprig and toYaml.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/Masterminds/sprig"
	"github.com/ghodss/yaml"
)

func main() {
	var top map[string]interface{}
	if err := json.NewDecoder(os.Stdin).Decode(&top); err != nil {
		panic(err)
	}
	functions := sprig.TxtFuncMap()
	functions["toYaml"] = func(value interface{}) string {
		text, err := yaml.Marshal(value)
		if err != nil {
			panic(err)
		}
		return strings.TrimSuffix(string(text), "\n")
	}
	helpers := template.New("helpers").Option("missingkey=error").Funcs(functions)
	functions["include"] = func(name string, value interface{}) (string, error) {
		var text strings.Builder
		err := helpers.ExecuteTemplate(&text, name, value)
		return text.String(), err
	}
	template.Must(helpers.Funcs(functions).ParseGlob(os.Args[1] + "/templates/*.tpl"))
	files, _ := filepath.Glob(os.Args[1] + "/templates/*.yaml")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			panic(err)
		}
		made := template.Must(template.New(file).Option("missingkey=error").Funcs(functions).Parse(string(text)))
		fmt.Println("---")
		if err := made.Execute(os.Stdout, top); err != nil {
			panic(err)
		}
		fmt.Println()
	}
}
